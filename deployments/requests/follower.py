"""The ingress' end of a replica's KV event stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from expertmesh.deployments.requests.feed import PROTOCOL
from expertmesh.errors import WireError
from expertmesh.routing.requests import Event
from expertmesh.routing.requests.stream import HEAD_BYTES, Opening, Record, body_bytes, decode
from expertmesh.routing.transport import Address, Peer, connect

log = logging.getLogger("expertmesh.ingress")

_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Source:
    """Where a replica's KV events are to be had; travels as the replica's Serve metadata."""

    node: str
    addresses: tuple[str, ...]

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Self | None:
        """From what a replica published; None if it serves no events."""
        found = metadata.get("kv_events")
        return None if found is None else cls(found["node"], tuple(found["addresses"]))

    def to_metadata(self) -> dict[str, Any]:
        """For `record_replica_metadata`."""
        return {"kv_events": {"node": self.node, "addresses": list(self.addresses)}}

    def best(self, here: str) -> Address:
        """The address to use on the node `here`: a unix socket on the same one. Raises WireError if there is none."""
        addresses = [Address.parse(text) for text in self.addresses]
        usable = [a for a in addresses if a.family == "tcp" or self.node == here]
        if not usable:
            raise WireError(f"no address of {self.addresses} can be reached from here")
        return min(usable, key=lambda address: address.family == "tcp")


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
        self, replica: str, source: Source, here: str, secret: bytes, timeout_s: float, reader: Reader
    ) -> None:
        self._replica = replica
        self._source = source
        self._here = here
        self._secret = secret
        self._timeout_s = timeout_s
        self._reader = reader
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
        address = self._source.best(self._here)
        connecting = asyncio.get_running_loop().run_in_executor(None, connect, address, self._secret, self._timeout_s)
        try:
            sock, peer = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_late)
            raise
        with contextlib.closing(sock):
            if peer.revision != PROTOCOL or peer.shard != self._replica:
                raise WireError(f"{address} leads to {peer.shard}, which speaks {peer.revision}")
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


def _close_late(connecting: asyncio.Future[tuple[socket.socket, Peer]]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[0].close()
