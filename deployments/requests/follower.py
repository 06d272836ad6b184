"""The ingress' end of a replica's KV event stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Protocol

from expertmesh.deployments.member_client import connect_to
from expertmesh.deployments.requests.feed import PROTOCOL
from expertmesh.deployments.source import Source
from expertmesh.errors import WireError
from expertmesh.routing.requests import Event
from expertmesh.routing.requests.stream import HEAD_BYTES, Opening, Record, body_bytes, decode
from expertmesh.routing.transport import Tls

log = logging.getLogger("expertmesh.ingress")

_RETRY_S = 0.5


class Reader(Protocol):
    """Who hears of a replica's events."""

    def opened(self, replica: str, block_tokens: int) -> None:
        """A stream begins; what is held comes next, as events."""

    def told(self, replica: str, events: Sequence[Event]) -> None:
        """What changed."""

    def lost(self, replica: str) -> None:
        """The stream ended; it will be opened again when that is possible."""


class Follower:
    """Keeps a stream to one replica open and tells `reader`, from construction until `stop`. On one event loop."""

    def __init__(
        self,
        replica: str,
        source: Source,
        here: str,
        secret: bytes,
        timeout_s: float,
        reader: Reader,
        tls: Tls | None = None,
    ) -> None:
        self._replica = replica
        self._source = source
        self._here = here
        self._secret = secret
        self._timeout_s = timeout_s
        self._reader = reader
        self._tls = tls
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def stop(self) -> None:
        """Nobody is told anything any more."""
        self._task.cancel()

    async def _follow(self) -> None:
        told = ""
        while True:
            try:
                await self._read()
            except (OSError, EOFError, WireError) as error:
                if str(error) != told:
                    told = str(error)
                    log.info("KV events of replica %s: %s; by load only until they are back", self._replica, told)
            self._reader.lost(self._replica)
            await asyncio.sleep(_RETRY_S)

    async def _read(self) -> None:
        """One connection from its beginning to its end, which is an error in any case."""
        sock, peer = await connect_to(self._source, PROTOCOL, self._here, self._secret, self._timeout_s, self._tls)
        with contextlib.closing(sock):
            if peer.shard != self._replica:
                raise WireError(f"its address leads to {peer.shard}")
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                opening = await _record(reader)
                if not isinstance(opening, Opening):
                    raise WireError("a stream that begins without an opening")
                self._reader.opened(self._replica, opening.block_tokens)
                while True:
                    event = await _record(reader)
                    if isinstance(event, Opening):
                        raise WireError("a second opening")
                    self._reader.told(self._replica, (event,))
            finally:
                writer.close()


async def _record(reader: asyncio.StreamReader) -> Record:
    head = await reader.readexactly(HEAD_BYTES)
    return decode(head, await reader.readexactly(body_bytes(head)))
