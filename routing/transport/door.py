"""Handshakes of those who connect, each in a thread, so that whoever serves the others never waits for a newcomer."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from expertmesh.errors import WireError
from expertmesh.routing.transport.auth import Peer, challenge
from expertmesh.routing.transport.relay import relayed
from expertmesh.routing.transport.session import challenge_over_tls
from expertmesh.routing.transport.tls import Tls

HANDSHAKE_TIMEOUT_S = 5.0
"""For all of it, TLS included."""
MAX_HANDSHAKES = 64
"""At once. A genuine one takes milliseconds, so at the limit the oldest is one of a client that says nothing."""


class Door:
    """Lets members in, over TLS where they come from other nodes and there is `tls`."""

    def __init__(self, secret: bytes, tls: Tls | None, log: logging.Logger) -> None:
        self._secret = secret
        self._tls = tls
        self._log = log
        self._greeting: dict[socket.socket, None] = {}
        """Sockets whose handshake is not over, oldest first."""
        self._threads = ThreadPoolExecutor(MAX_HANDSHAKES, thread_name_prefix="handshake")

    @property
    def waiting(self) -> int:
        """Handshakes that are not over."""
        return len(self._greeting)

    def greet(self, sock: socket.socket, me: Peer, admit: Callable[[socket.socket], None]) -> None:
        """Hands over a plain, non-blocking socket to `admit`, in another thread, once the client is known for a member.

        sock: is the door's from now on. Who isn't known is logged and gone.
        """
        while len(waiting := list(self._greeting)) >= MAX_HANDSHAKES:
            self._give_up(waiting[0])
        self._greeting[sock] = None
        self._threads.submit(self._greet, sock, me, admit)

    def close(self) -> None:
        """Ends the handshakes; nobody is admitted once it returns."""
        for sock in list(self._greeting):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends its handshake now instead of at the timeout
        self._threads.shutdown(cancel_futures=True)
        for sock in list(self._greeting):
            sock.close()
        self._greeting.clear()

    def _give_up(self, sock: socket.socket) -> None:
        """Ends a handshake now instead of at its timeout; its thread closes the socket."""
        self._greeting.pop(sock, None)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _greet(self, sock: socket.socket, me: Peer, admit: Callable[[socket.socket], None]) -> None:
        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            if self._tls is None or sock.family == socket.AF_UNIX:
                challenge(sock, self._secret, me)
                sock.setblocking(False)
                known = sock
            else:
                known = relayed(challenge_over_tls(sock, self._tls, self._secret, me))
        except (OSError, WireError) as error:
            self._log.warning("connection refused: %s", error)
            self._greeting.pop(sock, None)
            sock.close()
            return
        admit(known)
        self._greeting.pop(sock, None)
