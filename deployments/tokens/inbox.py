"""The ingress' end: listens, and hands each request's outputs to whoever expects them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from vllm.v1.engine import EngineCoreOutput

from expertmesh.deployments.member_server import MemberServer
from expertmesh.deployments.source import Source
from expertmesh.deployments.tokens.link import PROTOCOL, LinkLost
from expertmesh.deployments.tokens.wire import Batch, decoder, read_body
from expertmesh.errors import WireError
from expertmesh.routing.transport import Address, Tls

log = logging.getLogger("expertmesh.ingress")


class Sink(Protocol):
    """Who expects a request's outputs. Called on the inbox' event loop; must not raise."""

    def took(self, outputs: list[EngineCoreOutput]) -> None:
        """The next outputs; none as a sign of life."""

    def ended(self, error: BaseException | None) -> None:
        """Nothing more comes: all is sent, or an error ended it."""


class Inbox:
    """Where attention replicas send the outputs of the requests that they were given with `source`."""

    def __init__(self, me: str, node: str, secret: bytes, addresses: Sequence[Address], tls: Tls | None = None) -> None:
        """me: this ingress replica's id; node: its node's; addresses, tls: where and how to listen.

        Raises OSError if an address is taken.
        """
        self._expected: dict[str, Sink] = {}
        self._server = MemberServer(me, PROTOCOL, secret, addresses, self._read, log, tls)
        self.source = Source(node, self._server.addresses)
        """To be sent with a request."""

    def close(self) -> None:
        """Ends the connections, and with them the requests that came over them."""
        self._server.close()

    def expect(self, request_id: str, sink: Sink) -> None:
        """Gives what comes for the request to `sink`, until its end or `forget`; what comes later is dropped."""
        self._expected[request_id] = sink

    def expects(self, request_id: str) -> bool:
        """Whether the request's end has not come yet."""
        return request_id in self._expected

    def end(self, request_id: str, error: BaseException) -> None:
        """Ends a request with an error; does nothing if it has ended."""
        if (sink := self._expected.pop(request_id, None)) is not None:
            sink.ended(error)

    def forget(self, request_id: str) -> None:
        """Nobody expects it any more."""
        self._expected.pop(request_id, None)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One replica's connection, to its end. Requests that came over it and are not over are told of that."""
        decode = decoder()
        begun: set[str] = set()
        why = "its connection ended"
        try:
            while True:
                self._take(decode(await read_body(reader)), begun)
        except (OSError, EOFError) as error:
            why = f"its connection broke: {error!r}"
        except WireError as error:
            log.warning("an attention replica sent what it should not: %s", error)
            why = str(error)
        finally:
            for request_id in begun:
                self.end(request_id, LinkLost(why))

    def _take(self, batch: Batch, begun: set[str]) -> None:
        fresh: dict[str, list[EngineCoreOutput]] = {request_id: [] for request_id in batch.alive}
        for output in batch.outputs:
            fresh.setdefault(output.request_id, []).append(output)
        for request_id, outputs in fresh.items():
            if (sink := self._expected.get(request_id)) is not None:
                begun.add(request_id)
                sink.took(outputs)
        for request_id in batch.ended:
            begun.discard(request_id)
            if (sink := self._expected.pop(request_id, None)) is not None:
                sink.ended(None)
