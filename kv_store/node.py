"""One server: its connections, and whether it is worth asking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from redis.credentials import CredentialProvider

from expertmesh.kv_store.breaker import BreakerState, CircuitBreaker
from expertmesh.kv_store.channel import Channel
from expertmesh.kv_store.connection import ServerConnection
from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused, StoreSkipped, StoreTimeout
from expertmesh.kv_store.settings import Endpoint, StoreSettings

T = TypeVar("T")

CONNECTION_LIFE_S = 11 * 3600.0
"""ElastiCache cuts connections with IAM authentication after 12 hours; an older one than this is made anew."""
_AWAY = ("LOADING", "CLUSTERDOWN", "MASTERDOWN", "NOAUTH", "WRONGPASS")
"""Refusals that the next request would get as well."""


@dataclass(slots=True)
class _Link:
    connection: ServerConnection
    channel: Channel
    opened_at: float


class Node:
    """A server's connections behind a circuit breaker.

    Safe for concurrent use: each call has a connection of its own.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: StoreSettings,
        credentials: CredentialProvider | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self._settings = settings
        self._credentials = credentials
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[_Link] = []
        self._breaker = CircuitBreaker()
        self._closed = False

    def run(self, action: Callable[[Channel], T], deadline: float, patient: bool) -> T:
        """What the action does with a connection, by the deadline (`time.monotonic`).

        An idle connection that turns out to be dead, as after a server's restart, is replaced once by a new one, so
        the action must be one that may be done twice. Raises StoreSkipped without asking while the breaker is open,
        StoreTimeout, StoreClosed or StoreRefused (the login) where the server failed. These open the breaker, except a
        timeout that found the server at work, where `patient`: the caller measures how slow it is.
        """
        with self._lock:
            if not self._breaker.allows():
                raise StoreSkipped(f"{self.endpoint} failed a moment ago and is left alone")
        try:
            result = self._tried(action, deadline)
        except StoreError as error:
            if not (patient and isinstance(error, StoreTimeout) and error.progress):
                self._failed()
            raise
        with self._lock:
            self._breaker.succeeded()
        return result

    def refused(self, errors: Sequence[StoreRefused]) -> bool:
        """Judges errors that came as replies. True if the server can't be used now: the breaker opened."""
        away = any(error.code in _AWAY for error in errors)
        if away:
            self._failed()
        return away

    def probe(self, timeout_s: float) -> None:
        """Asks the server whether it is back, if it is time for that. Closes the breaker if so."""
        with self._lock:
            if not self._breaker.probe(self._clock()):
                return
        try:
            self._tried(lambda channel: channel.ping(deadline), deadline := time.monotonic() + timeout_s)
        except StoreError:
            self._failed()
        else:
            with self._lock:
                self._breaker.probed()

    def probe_in_s(self) -> float | None:
        """Seconds until `probe` has something to do; None while all is well."""
        with self._lock:
            return self._breaker.probe_in_s(self._clock())

    @property
    def state(self) -> BreakerState:
        """The circuit breaker's state."""
        return self._breaker.state

    @property
    def opened(self) -> int:
        """How often the circuit breaker opened."""
        return self._breaker.opened

    def close(self) -> None:
        """Closes idle connections now and others after their use."""
        with self._lock:
            self._closed = True
            links, self._idle = self._idle, []
        for link in links:
            link.connection.close()

    def _failed(self) -> None:
        with self._lock:
            self._breaker.failed(self._clock())
            links, self._idle = self._idle, []
        for link in links:
            link.connection.close()

    def _tried(self, action: Callable[[Channel], T], deadline: float) -> T:
        link = self._taken()
        if link is not None:
            try:
                return self._used(link, action)
            except StoreClosed:
                pass
        return self._used(self._connected(deadline), action)

    def _used(self, link: _Link, action: Callable[[Channel], T]) -> T:
        try:
            result = action(link.channel)
        except BaseException:
            link.connection.close()
            raise
        with self._lock:
            keep = not self._closed and self._breaker.state is not BreakerState.OPEN
            if keep:
                self._idle.append(link)
        if not keep:
            link.connection.close()
        return result

    def _taken(self) -> _Link | None:
        now = self._clock()
        old: list[_Link] = []
        try:
            with self._lock:
                while self._idle:
                    link = self._idle.pop()
                    if now - link.opened_at < CONNECTION_LIFE_S:
                        return link
                    old.append(link)
                return None
        finally:
            for link in old:
                link.connection.close()

    def _connected(self, deadline: float) -> _Link:
        left = deadline - time.monotonic()
        if left <= 0:
            raise StoreTimeout(f"no time left to connect to {self.endpoint}", progress=True)
        opened_at = self._clock()
        connection = ServerConnection(self.endpoint, self._settings, self._credentials, left)
        return _Link(connection, Channel(connection.socket), opened_at)
