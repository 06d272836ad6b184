"""TLS over a socket that stays plain, for as long as a connection is being opened; then the relay takes it over.

    server -> client   "XMT1" | zeros, as long as the head of a greeting without TLS
    both               TLS 1.3 handshake, certificates on both sides
    inside TLS         the challenge of `auth`, its key derived from the secret and both certificates

The first word is there because in TLS the client speaks first and in the challenge the server does: without it, two
sides of which only one has TLS would wait for each other until a timeout.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import ssl
import time
from collections.abc import Callable
from typing import TypeVar

from expertmesh.errors import WireError
from expertmesh.routing.transport.auth import (
    HEAD_BYTES,
    TLS_DEMAND,
    TLS_OFFER,
    Peer,
    answer,
    challenge,
    receive_exactly,
)
from expertmesh.routing.transport.tls import Credentials, Tls

_READ_BYTES = 1 << 14
_LEAST_TIMEOUT_S = 0.001

_T = TypeVar("_T")


class TlsSession:
    """One end of a connection, blocking. What its socket's timeout was at first is the time for all that it does."""

    def __init__(self, sock: socket.socket, credentials: Credentials, *, server: bool) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = credentials.server if server else credentials.client
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=server)
        self._own, self._server = credentials.fingerprint, server
        self._deadline: float | None
        self.settimeout(sock.gettimeout())

    def handshake(self) -> None:
        """Raises WireError in words, TimeoutError, or another OSError."""
        try:
            self._do(self.tls.do_handshake)
        except EOFError:
            raise WireError("peer closed the connection in the TLS handshake; is routing.tls set there?") from None
        except ssl.SSLError as error:
            with contextlib.suppress(OSError):
                self._flush()  # so that the peer hears why
            raise WireError(_in_words(error)) from error

    def bound(self, secret: bytes) -> bytes:
        """The challenge's key on this channel: with another certificate at either end it is another one."""
        shown = self.tls.getpeercert(binary_form=True)
        assert shown is not None, "a certificate is required"
        peer = hashlib.sha256(shown).digest()
        ends = self._own + peer if self._server else peer + self._own
        return hmac.new(secret, b"tls channel" + ends, hashlib.sha256).digest()

    def gettimeout(self) -> float | None:
        """Seconds that are left."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), _LEAST_TIMEOUT_S)

    def settimeout(self, value: float | None) -> None:
        """Seconds from now on."""
        self._deadline = None if value is None else time.monotonic() + value

    def sendall(self, data: bytes) -> None:
        """Sends all of it."""
        self.tls.write(data)
        self._flush()

    def recv_into(self, buffer: memoryview) -> int:
        """Bytes received; 0 if the peer closed. Raises WireError if it refused this side's certificate."""
        try:
            return self._do(lambda: read_into(self.tls, buffer))
        except (EOFError, ssl.SSLZeroReturnError):
            return 0
        except ssl.SSLError as error:
            raise WireError(_in_words(error)) from error

    def _do(self, action: Callable[[], _T]) -> _T:
        """What `action` returns once it has read enough. Raises EOFError if the peer closes before."""
        while True:
            try:
                done = action()
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
                continue
            self._flush()
            return done

    def _flush(self) -> None:
        if self.outgoing.pending:
            self.sock.settimeout(self.gettimeout())
            self.sock.sendall(self.outgoing.read())

    def _feed(self) -> None:
        if self._deadline is not None and self._deadline <= time.monotonic():
            raise TimeoutError("timed out")
        self.sock.settimeout(self.gettimeout())
        data = self.sock.recv(_READ_BYTES)
        if not data:
            raise EOFError
        self.incoming.write(data)


def read_into(tls: ssl.SSLObject, buffer: memoryview) -> int:
    """Bytes read; 0 after the peer's farewell. Raises SSLError: SSLWantReadError, SSLZeroReturnError."""
    return tls.read(len(buffer), buffer)  # type: ignore[return-value]  # a count, where there is a buffer


def challenge_over_tls(sock: socket.socket, tls: Tls, secret: bytes, me: Peer) -> TlsSession:
    """The server's part, on a blocking socket with a timeout. Raises WireError if the client is no member."""
    sock.sendall(TLS_OFFER)
    session = TlsSession(sock, tls.current(), server=True)
    session.handshake()
    challenge(session, session.bound(secret), me)
    return session


def answer_over_tls(sock: socket.socket, tls: Tls, secret: bytes) -> tuple[TlsSession, Peer]:
    """The client's part, on a blocking socket with a timeout. Raises WireError if the server is no member."""
    offer = receive_exactly(sock, HEAD_BYTES)
    if offer != TLS_OFFER:
        if offer.startswith(b"XMA"):
            sock.sendall(TLS_DEMAND)
            raise WireError("shard has no TLS, and routing.tls is set here")
        raise WireError("peer is not an expert shard of this version")
    session = TlsSession(sock, tls.current(), server=False)
    session.handshake()
    return session, answer(session, session.bound(secret))


def _in_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the peer's certificate is refused: {error.verify_message}"
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return f"TLS: the peer refused: {reason}" if " alert " in f" {reason}" else f"TLS: {reason}"
