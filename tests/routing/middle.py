"""Somebody in the middle of a TCP connection: passes bytes on, listens, and can do harm."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from expertmesh.routing.transport import Address


class Middle:
    """Listens in the place of `upstream`; what it hears is in `up` (from clients) and `down` (from the server)."""

    def __init__(self, upstream: Address) -> None:
        self._upstream = (upstream.name, upstream.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("tcp", "127.0.0.1", self._listener.getsockname()[1])
        self.up, self.down = bytearray(), bytearray()
        self._flips = 0
        self._passing = threading.Event()
        self._passing.set()
        self._socks: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def flip_a_bit(self) -> None:
        """Changes the next thing that a server says."""
        self._flips = 1

    def hold(self) -> None:
        """Passes on nothing for now."""
        self._passing.clear()

    def let_go(self) -> None:
        """Passes on everything again."""
        self._passing.set()

    def cut(self) -> None:
        """Ends every connection on both sides without a word of TLS."""
        for pair in self._socks:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends everything."""
        self.let_go()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for pair in self._socks:
            for sock in pair:
                sock.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                self._socks.append((client, server))
                for source, sink, heard in ((client, server, self.up), (server, client, self.down)):
                    thread = threading.Thread(target=self._pass_on, args=(source, sink, heard))
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, heard: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                self._passing.wait()
                heard += data
                if heard is self.down and self._flips:
                    self._flips -= 1
                    data[-1] ^= 1
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def middle(upstream: Address) -> Iterator[Middle]:
    """One that is gone after the block."""
    running = Middle(upstream)
    try:
        yield running
    finally:
        running.close()
