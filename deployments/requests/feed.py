"""The replica's end of its KV event stream: from the engine's publisher to everyone who routes requests here.

vLLM's engine process publishes over ZeroMQ on this machine. The replica keeps a mirror of the cache, so that a reader
that joins, or that can't keep up, gets what is held now instead of a history: memory is bounded by the size of the
cache, and of what is remembered of the store, for each reader. Readers connect over authenticated sockets, as
dispatchers do to shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import KVEventBatch

from expertmesh.deployments.member_server import MemberServer
from expertmesh.deployments.requests.hashes import HASH_ALGORITHM
from expertmesh.deployments.requests.mirror import CacheMirror
from expertmesh.routing.requests import Cleared, Event
from expertmesh.routing.requests.stream import Opening, Record, encode
from expertmesh.routing.transport import Address, Tls

log = logging.getLogger("expertmesh.attention")

PROTOCOL = "kv-events-2"
"""What a feed introduces itself with in the place of a checkpoint's revision; another number for other records."""
_MAX_READERS = 256
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
        self._servers: list[MemberServer] = []
        self._context = zmq.asyncio.Context()
        self._published = self._context.socket(zmq.SUB)
        self._published.setsockopt(zmq.RCVHWM, _PUBLISHED)
        self._published.setsockopt(zmq.LINGER, 0)
        self._published.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._published.subscribe(b"")
        self._published.connect(endpoint)
        self._following = asyncio.get_running_loop().create_task(self._follow())

    def serve(
        self, me: str, secret: bytes, addresses: Sequence[Address], block_tokens: int, tls: Tls | None = None
    ) -> None:
        """Begins to take readers. me: this replica's id; block_tokens: the engine's block size; tls: what readers from
        other nodes must use.

        Raises OSError if an address is taken.
        """
        opening = Opening(block_tokens)

        async def tell(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._tell(stream, writer, opening)

        server = MemberServer(me, PROTOCOL, secret, addresses, tell, log, tls, _MAX_READERS)
        self._servers.append(server)
        self.addresses += server.addresses

    def close(self) -> None:
        """Ends the streams."""
        self._following.cancel()
        for server in self._servers:
            server.close()
        self._published.close()
        self._context.term()

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
                reader.push(events, self._mirror)

    async def _tell(self, stream: asyncio.StreamReader, writer: asyncio.StreamWriter, opening: Opening) -> None:
        reader = _Reader()
        reader.push(self._mirror.whole(), self._mirror)
        self._readers.add(reader)
        writing = asyncio.get_running_loop().create_task(reader.write_to(writer, opening))
        try:
            await stream.read(1)  # readers say nothing: it is gone
        finally:
            self._readers.discard(reader)
            writing.cancel()


class _Reader:
    """What one reader is to be told."""

    def __init__(self) -> None:
        self._pending: list[Event] = []
        self._blocks = 0
        self._wake = asyncio.Event()

    def push(self, events: Iterable[Event], mirror: CacheMirror) -> None:
        """Adds changes that `mirror` took; a reader that is too far behind gets the whole instead of what it missed."""
        for event in events:
            self._pending.append(event)
            self._blocks += 1 if isinstance(event, Cleared) else len(event.blocks)
        if self._blocks > len(mirror) + _SLACK_BLOCKS:
            self._pending = mirror.whole()
            self._blocks = len(mirror)
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
