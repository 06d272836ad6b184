"""The replica's end of its KV event stream: from the engine's publisher to everyone who routes requests here.

vLLM's engine process publishes over ZeroMQ on this machine. The replica keeps a mirror of the cache, so that a reader
that joins, or that can't keep up, gets what is held now instead of a history: memory is bounded by the size of the
cache, for each reader. Readers connect over authenticated sockets, as dispatchers do to shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import KVEventBatch

from expertmesh.deployments.requests.hashes import HASH_ALGORITHM
from expertmesh.deployments.requests.mirror import CacheMirror
from expertmesh.errors import WireError
from expertmesh.routing.requests import Cleared, Event, Stored
from expertmesh.routing.requests.stream import Opening, Record, encode
from expertmesh.routing.transport import Address, Peer, challenge, listen

log = logging.getLogger("expertmesh.attention")

PROTOCOL = "kv-events-1"
"""What a feed introduces itself with in the place of a checkpoint's revision."""
_MAX_READERS = 256
_HANDSHAKE_TIMEOUT_S = 5.0
_HANDSHAKE_THREADS = 2
_PAUSE_S = 1.0
_SLACK_BLOCKS = 4096
"""A reader may be behind by what is held now and this; then it gets the whole again."""
_RECONNECT_MS = 20
"""The engine's end appears while it starts; what is published until this one has found it is lost."""
_PUBLISHED = 10_000
"""Batches that wait for the replica at most; beyond, ZeroMQ drops some and the mirror starts again."""


class KVEventFeed:
    """Follows an engine's KV events from the start and serves them from `serve` on. On one event loop."""

    def __init__(self, folder: Path) -> None:
        """folder: of this replica alone; the publisher's socket is made there."""
        endpoint = f"ipc://{folder / 'kv-events'}"
        self.engine_arguments = {
            "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint),
            "prefix_caching_hash_algo": HASH_ALGORITHM,
        }
        """What the engine needs to publish where this listens."""
        self.addresses: tuple[str, ...] = ()
        """Where readers connect; none before `serve`."""
        self._mirror = CacheMirror()
        self._readers: set[_Reader] = set()
        self._connections = 0
        self._listeners: list[socket.socket] = []
        self._handshakes = ThreadPoolExecutor(_HANDSHAKE_THREADS, "kv-events")
        self._context = zmq.asyncio.Context()
        self._published = self._context.socket(zmq.SUB)
        self._published.setsockopt(zmq.RCVHWM, _PUBLISHED)
        self._published.setsockopt(zmq.LINGER, 0)
        self._published.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._published.subscribe(b"")
        self._published.connect(endpoint)
        self._tasks = {asyncio.get_running_loop().create_task(self._follow())}

    def serve(self, me: str, secret: bytes, addresses: Sequence[Address], block_tokens: int) -> None:
        """Begins to take readers. me: this replica's id; block_tokens: the engine's block size.

        Raises OSError if an address is taken.
        """
        for wanted in addresses:
            listener, address = listen(wanted)
            listener.setblocking(False)
            self._listeners.append(listener)
            self.addresses += (str(address),)
            peer = Peer(me, PROTOCOL, width=0, dtype="")  # no rows are taken here
            self._start(self._accept(listener, secret, peer, Opening(block_tokens)))

    def close(self) -> None:
        """Ends the streams."""
        for task in self._tasks:
            task.cancel()
        for listener in self._listeners:
            listener.close()
        self._handshakes.shutdown(wait=False, cancel_futures=True)
        self._published.close()
        self._context.term()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self) -> None:
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        expected = 0
        while True:
            _, number, payload = await self._published.recv_multipart()
            sequence = int.from_bytes(number, "big")
            events: list[Event] = [] if sequence == expected else self._mirror.forget()
            expected = sequence + 1
            try:
                events += self._mirror.apply(decoder.decode(payload))
            except msgspec.MsgspecError as error:
                log.warning("the engine published KV events that are not understood: %s", error)
                events = self._mirror.forget()
            for reader in self._readers:
                reader.push(events, self._mirror.held)

    async def _accept(self, listener: socket.socket, secret: bytes, me: Peer, opening: Opening) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptor left, or the client is gone already
                log.warning("can't take a reader of KV events: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            if self._connections < _MAX_READERS:
                self._connections += 1
                self._start(self._serve_one(sock, secret, me, opening))
            else:
                sock.close()

    async def _serve_one(self, sock: socket.socket, secret: bytes, me: Peer, opening: Opening) -> None:
        try:
            sock.settimeout(_HANDSHAKE_TIMEOUT_S)
            await asyncio.get_running_loop().run_in_executor(self._handshakes, challenge, sock, secret, me)
            sock.setblocking(False)
            stream, writer = await asyncio.open_connection(sock=sock)
        except BaseException as error:
            sock.close()
            self._connections -= 1
            if not isinstance(error, OSError | WireError):
                raise
            log.warning("a reader of KV events was refused: %s", error)
            return
        reader = _Reader()
        reader.push(_whole(self._mirror.held), self._mirror.held)
        self._readers.add(reader)
        writing = asyncio.get_running_loop().create_task(reader.write_to(writer, opening))
        try:
            await stream.read(1)  # readers say nothing: it is gone
        except OSError as error:
            log.info("a reader of KV events is gone: %s", error)
        finally:
            self._readers.discard(reader)
            self._connections -= 1
            writing.cancel()
            writer.close()


class _Reader:
    """What one reader is to be told."""

    def __init__(self) -> None:
        self._pending: list[Event] = []
        self._blocks = 0
        self._wake = asyncio.Event()

    def push(self, events: Iterable[Event], held: Collection[int]) -> None:
        """Adds changes that led to `held`; a reader that is too far behind gets `held` instead of what it missed."""
        for event in events:
            self._pending.append(event)
            self._blocks += 1 if isinstance(event, Cleared) else len(event.blocks)
        if self._blocks > len(held) + _SLACK_BLOCKS:
            self._pending = _whole(held)
            self._blocks = len(held)
        self._wake.set()

    async def write_to(self, writer: asyncio.StreamWriter, opening: Opening) -> None:
        """Writes as fast as the other end reads, until it is gone."""
        records: Sequence[Record] = (opening,)
        with contextlib.suppress(OSError):
            while True:
                writer.write(encode(records))
                await writer.drain()
                await self._wake.wait()
                self._wake.clear()
                records, self._pending, self._blocks = self._pending, [], 0


def _whole(held: Collection[int]) -> list[Event]:
    return [Cleared(), Stored(tuple(held))]
