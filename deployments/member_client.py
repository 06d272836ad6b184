"""Connects to other members of the mesh from an event loop: the other end of `member_server`."""

from __future__ import annotations

import asyncio
import socket

from expertmesh.deployments.source import Source
from expertmesh.errors import WireError
from expertmesh.routing.transport import Peer, Tls, connect


async def connect_to(
    source: Source, protocol: str, here: str, secret: bytes, timeout_s: float, tls: Tls | None = None
) -> tuple[socket.socket, Peer]:
    """A connected, authenticated, non-blocking socket and who is at its other end. Nothing stays open if the caller is
    cancelled.

    protocol: what is to be spoken; here: this node's id; tls: what other nodes are reached with. Raises WireError if no
    address can be reached from here, nothing answers there in `timeout_s`, or it speaks something else.
    """
    address = source.best(here)
    connecting = asyncio.get_running_loop().run_in_executor(None, connect, address, secret, timeout_s, tls)
    try:
        sock, peer = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close_late)
        raise
    if peer.revision != protocol:
        sock.close()
        raise WireError(f"{address} leads to {peer.shard}, which speaks {peer.revision}, not {protocol}")
    return sock, peer


def _close_late(connecting: asyncio.Future[tuple[socket.socket, Peer]]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[0].close()
