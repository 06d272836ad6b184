"""An attention replica's end: one connection to each ingress that has given it a request."""

from __future__ import annotations

import asyncio
import logging
from weakref import WeakValueDictionary

from vllm.v1.engine import EngineCoreOutput

from expertmesh.deployments.member_client import connect_to
from expertmesh.deployments.source import Source
from expertmesh.deployments.tokens.link import PROTOCOL, LinkLost
from expertmesh.deployments.tokens.wire import Batch, encoder
from expertmesh.errors import WireError
from expertmesh.routing.transport import Tls

log = logging.getLogger("expertmesh.attention")

_MOST_BEHIND = 1 << 16
"""Outputs that wait for an ingress that doesn't read; then its connection is given up."""


class Outbox:
    """To one ingress. What is put in the same turn of the event loop goes as one message."""

    def __init__(self, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        self._writer = writer
        self._reader = reader
        self._batch = Batch()
        self._wake = asyncio.Event()
        self.closed = False
        """Nothing that is put reaches the ingress any more."""

    @property
    def pending(self) -> bool:
        """Whether something was put and is not in the hands of the operating system yet."""
        waiting = self._batch.outputs or self._batch.alive or self._batch.ended
        return not self.closed and (bool(waiting) or self._writer.transport.get_write_buffer_size() > 0)

    def put(self, request_id: str, outputs: list[EngineCoreOutput]) -> None:
        """Sends a request's outputs, none as a sign of life. Raises LinkLost if the ingress can't be reached."""
        if self.closed:
            raise LinkLost("the ingress that asked can't be reached any more")
        if outputs:
            self._batch.outputs += outputs
            if len(self._batch.outputs) > _MOST_BEHIND:
                self._writer.transport.abort()  # it notices, and its requests go on elsewhere
        else:
            self._batch.alive.append(request_id)
        self._wake.set()

    def end(self, request_id: str) -> None:
        """Tells that nothing more comes of a request."""
        self._batch.ended.append(request_id)
        self._wake.set()

    async def run(self) -> None:
        """Writes what is put, until the connection is gone."""
        writing = asyncio.ensure_future(self._write())
        try:
            gone = asyncio.ensure_future(self._reader.read(1))  # an inbox says nothing
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            for task in (writing, gone):
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    log.info("the connection to an ingress is gone: %s", error)
        finally:
            self.closed = True
            writing.cancel()
            self._writer.transport.abort()

    async def _write(self) -> None:
        encode = encoder()
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._batch = self._batch, Batch()
            self._writer.writelines(encode(batch))
            await self._writer.drain()


class Outboxes:
    """All that this replica has. On one event loop."""

    def __init__(self, node: str, secret: bytes, timeout_s: float, tls: Tls | None = None) -> None:
        """node: this replica's; timeout_s: for a connection to be made; tls: what other nodes are reached with."""
        self._node = node
        self._secret = secret
        self._timeout_s = timeout_s
        self._tls = tls
        self._boxes: dict[Source, Outbox] = {}
        self._turns: WeakValueDictionary[Source, asyncio.Lock] = WeakValueDictionary()
        """Held by those who connect or wait for it."""
        self._running: set[asyncio.Task[None]] = set()

    async def to(self, source: Source) -> Outbox:
        """The one to an inbox; connects if there is none. Raises LinkLost if that is not possible."""
        async with self._turns.setdefault(source, asyncio.Lock()):
            box = self._boxes.get(source)
            if box is None or box.closed:
                box = self._boxes[source] = await self._connected(source)
            return box

    def close(self) -> None:
        """Ends the connections."""
        for task in self._running:
            task.cancel()

    async def _connected(self, source: Source) -> Outbox:
        try:
            sock, _ = await connect_to(source, PROTOCOL, self._node, self._secret, self._timeout_s, self._tls)
            try:
                reader, writer = await asyncio.open_connection(sock=sock)
            except BaseException:
                sock.close()
                raise
        except (OSError, WireError) as error:
            raise LinkLost(f"the ingress that asks can't be reached: {error}") from error
        box = Outbox(writer, reader)
        task = asyncio.get_running_loop().create_task(self._run(source, box))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return box

    async def _run(self, source: Source, box: Outbox) -> None:
        try:
            await box.run()
        finally:
            if self._boxes.get(source) is box:
                del self._boxes[source]
