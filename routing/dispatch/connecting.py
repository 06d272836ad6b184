"""Connections that open while steps go on: a shard that hangs in its handshake must not hold up a step.

A thread opens each; whoever needs it looks in. A shard that was never in trouble is waited for, briefly, since its
handshake takes a millisecond; one that failed is not.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

from expertmesh.errors import WireError
from expertmesh.routing.transport import Address, Peer, Tls, connect

GRACE_S = 0.1
"""How long a shard that never failed is waited for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    connection: tuple[socket.socket, Peer] | None
    """None if it failed."""
    why: str
    """It failed."""
    seconds: float
    """What it took."""


class Attempt:
    """One attempt to connect, in a thread of its own, which ends with the attempt's timeout at the latest."""

    def __init__(self, address: Address, secret: bytes, timeout_s: float, tls: Tls | None = None) -> None:
        self._lock = threading.Lock()
        self._outcome: Outcome | None = None
        self._unwanted = False
        self._over = threading.Event()
        arguments = (address, secret, timeout_s, tls)
        threading.Thread(target=self._run, args=arguments, name="connecting", daemon=True).start()

    def outcome(self, wait_s: float) -> Outcome | None:
        """How it ended; None if it has not within `wait_s` seconds."""
        self._over.wait(wait_s) if wait_s else None
        return self._outcome

    def cancel(self) -> None:
        """Closes the connection now, or as soon as there is one."""
        with self._lock:
            self._unwanted = True
            outcome = self._outcome
        if outcome is not None and outcome.connection is not None:
            outcome.connection[0].close()

    def _run(self, address: Address, secret: bytes, timeout_s: float, tls: Tls | None) -> None:
        begin = time.monotonic()
        why, connection = "", None
        try:
            connection = connect(address, secret, timeout_s, tls)
        except WireError as error:
            why = str(error)
        with self._lock:
            self._outcome = Outcome(connection, why, time.monotonic() - begin)
            unwanted = self._unwanted
        if unwanted and connection is not None:
            connection[0].close()
        self._over.set()
