"""Opening a connection: address, TLS and login are redis-py's; the socket that it opened is then ours for bulk data."""

from __future__ import annotations

import socket
from typing import Any

import redis
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider

from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused, StoreTimeout
from expertmesh.kv_store.settings import Endpoint, StoreSettings

_BUFFER_BYTES = 4 << 20


class _Opened:
    """Gives out the socket that redis-py connected and logged in with."""

    _sock: Any

    @property
    def opened_socket(self) -> socket.socket:
        """The socket: redis-py has read the replies to all that it sent."""
        sock: socket.socket = self._sock
        return sock


class _Tcp(_Opened, Connection):
    pass


class _Tls(_Opened, SSLConnection):
    pass


class _Unix(_Opened, UnixDomainSocketConnection):
    pass


class ServerConnection:
    """A connection to one server, logged in.

    Opening takes `timeout_s` for the connection and for each step of the login. Raises StoreTimeout; StoreRefused with
    the server's reply to the login; StoreClosed for all else.
    """

    def __init__(
        self, endpoint: Endpoint, settings: StoreSettings, credentials: CredentialProvider | None, timeout_s: float
    ) -> None:
        self._endpoint = endpoint
        options: dict[str, Any] = {
            "credential_provider": credentials,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "protocol": 2,
            "driver_info": None,
        }
        kind: Any
        if endpoint.path:
            kind = _Unix
            options["path"] = endpoint.path
        else:
            kind = _Tls if endpoint.tls else _Tcp
            options |= {"host": endpoint.host, "port": endpoint.port, "socket_keepalive": True}
            if endpoint.tls and settings.ca_file is not None:
                options["ssl_ca_certs"] = str(settings.ca_file)
        self._connection: Any = kind(**options)
        try:
            self._connection.connect()
        except StoreError:  # of the credentials
            self.close()
            raise
        except (redis.RedisError, OSError, ValueError) as error:  # ValueError: a host name that can't be one
            self.close()
            raise self._explained(error) from None
        if endpoint.path:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)

    @property
    def socket(self) -> socket.socket:
        """The connected socket, with nothing unread."""
        sock: socket.socket = self._connection.opened_socket
        return sock

    def command(self, *words: str | bytes) -> object:
        """The reply to one small command, as redis-py reads it. Raises as the constructor does."""
        try:
            self._connection.send_command(*words)
            return self._connection.read_response()
        except (redis.RedisError, OSError) as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Closes the socket."""
        self._connection.disconnect()

    def _explained(self, error: Exception) -> StoreError:
        if isinstance(error, redis.exceptions.TimeoutError):
            return StoreTimeout(f"{self._endpoint} did not answer in time")
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
            return StoreRefused(f"WRONGPASS {self._endpoint} refused the login: {error}")
        if isinstance(error, redis.exceptions.ResponseError):
            return StoreRefused(str(error))
        return StoreClosed(f"{self._endpoint} can't be reached: {error}")
