"""Stream sockets: unix on one node, TCP between nodes.

Unix sockets are bound in Linux's abstract namespace (`unix:@name`), so a killed process leaves no file behind.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Self

from expertmesh.errors import WireError
from expertmesh.routing.transport.auth import Peer, answer
from expertmesh.routing.transport.relay import relayed
from expertmesh.routing.transport.session import answer_over_tls
from expertmesh.routing.transport.tls import Tls

_BUFFER_BYTES = 4 << 20
_BACKLOG = 128
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A peer whose node went dark without a word is noticed after 30 s of silence."""
_UNACKNOWLEDGED_MS = 30_000
"""How long sent bytes may stay unacknowledged: while some do, no keepalive is sent."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a shard listens: `unix:@name` or `tcp:host:port`."""

    family: str
    name: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what `str()` writes. Raises WireError for anything else."""
        family, _, rest = text.partition(":")
        if family == "unix" and rest.startswith("@") and len(rest) > 1:
            return cls("unix", rest[1:])
        host, _, port = rest.rpartition(":")
        if family == "tcp" and host and port.isdecimal() and len(port) <= 5 and int(port) <= 65_535:
            return cls("tcp", host, int(port))
        raise WireError(f"address {text!r}; allowed: unix:@NAME or tcp:HOST:PORT")

    def __str__(self) -> str:
        return f"unix:@{self.name}" if self.family == "unix" else f"tcp:{self.name}:{self.port}"


def tune(sock: socket.socket) -> None:
    """Makes a connection fit for frames."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):  # its buffers the kernel sizes itself
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket and the address that it really has (port 0: a free one). Raises OSError if it is taken."""
    if address.family == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind("\0" + address.name)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return sock, address
    sock = socket.create_server((address.name, address.port), backlog=_BACKLOG)
    return sock, Address("tcp", address.name, sock.getsockname()[1])


def accepted(listener: socket.socket) -> socket.socket:
    """The next connection of a listener, tuned for frames."""
    sock, _ = listener.accept()
    tune(sock)
    return sock


def _opened(address: Address, timeout_s: float) -> socket.socket:
    if address.family == "tcp":
        return socket.create_connection((address.name, address.port), timeout=timeout_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect("\0" + address.name)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(address: Address, secret: bytes, timeout_s: float, tls: Tls | None = None) -> tuple[socket.socket, Peer]:
    """A connected, mutually authenticated, non-blocking socket and who is at its other end.

    tls: what TCP is encrypted with. Raises WireError if nothing listens there, it does not answer in `timeout_s`, it
    can't prove the secret, or only one of both sides has TLS.
    """
    try:
        sock = _opened(address, timeout_s)
    except (OSError, ValueError) as error:  # ValueError: a host name that can't be one
        raise WireError(f"no shard answers at {address}: {error}") from error
    try:
        tune(sock)
        if tls is not None and address.family == "tcp":
            session, peer = answer_over_tls(sock, tls, secret)
            return relayed(session), peer
        peer = answer(sock, secret)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise WireError(f"shard at {address} broke off the handshake: {error}") from error
    except WireError:
        sock.close()
        raise
    return sock, peer
