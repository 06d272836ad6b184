"""Takes connections from other members of the mesh on one event loop: authenticated, over TLS between nodes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence

from expertmesh.routing.transport import Address, Door, Peer, Tls, listen
from expertmesh.routing.transport.sockets import tune

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
"""Talks over one connection until that is over; need not close it."""

_PAUSE_S = 1.0
_MOST = 4096


class MemberServer:
    """Listens from construction until `close`."""

    def __init__(
        self,
        me: str,
        protocol: str,
        secret: bytes,
        addresses: Sequence[Address],
        serve: Serve,
        log: logging.Logger,
        tls: Tls | None = None,
        most: int = _MOST,
    ) -> None:
        """me: this replica's id; protocol: what is spoken here, told in the place of a checkpoint's revision; tls: what
        members on other nodes must use; most: connections at once, more are closed.

        Raises OSError if an address is taken.
        """
        self._serve = serve
        self._log = log
        self._most = most
        self._serving: set[asyncio.Task[None]] = set()
        self._closed = False
        self._door = Door(secret, tls, log)
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self.addresses: tuple[str, ...] = ()
        """Where it is reached, ports included."""
        peer = Peer(me, protocol, width=0, dtype="")  # no rows are taken here
        for wanted in addresses:
            listener, address = listen(wanted)
            listener.setblocking(False)
            self._listeners.append(listener)
            self.addresses += (str(address),)
            self._accepting.append(asyncio.get_running_loop().create_task(self._accept(listener, peer)))

    def close(self) -> None:
        """Ends the connections and takes no others."""
        self._closed = True
        for task in (*self._accepting, *self._serving):
            task.cancel()
        for listener in self._listeners:
            listener.close()
        self._door.close()

    async def _accept(self, listener: socket.socket, me: Peer) -> None:
        loop = asyncio.get_running_loop()

        def admit(sock: socket.socket) -> None:
            try:
                loop.call_soon_threadsafe(self._admit, sock)
            except RuntimeError:  # the loop is closed
                sock.close()

        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
                tune(sock)
            except OSError as error:  # no file descriptor left, or the client is gone already
                self._log.warning("can't take a connection of %s: %s", me.revision, error)
                await asyncio.sleep(_PAUSE_S)
                continue
            self._door.greet(sock, me, admit)

    def _admit(self, sock: socket.socket) -> None:
        if self._closed or len(self._serving) >= self._most:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve_one(sock))
        self._serving.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._serving.discard(task)
            if task.cancelled():  # before it had the connection, maybe before it began
                sock.close()

        task.add_done_callback(done)

    async def _serve_one(self, sock: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except OSError as error:
            self._log.info("a connection is gone: %s", error)
            sock.close()
            return
        try:
            await self._serve(reader, writer)
        except OSError as error:
            self._log.info("a connection is gone: %s", error)
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()
