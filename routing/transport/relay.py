"""Moves bytes between TLS connections and the plain sockets that native code reads and writes.

One thread a process carries all of its TLS connections, from the first to the last. For each there is a pair of unix
sockets: the far end is what the frames' code gets in the place of a TCP socket. No end is read while what came from it
last is not written, so a connection holds at most 256 KiB each way here, and pressure goes through. What happens to one
end happens to the other: a half-close is passed on, after a broken record, an end without TLS's own farewell, or an
error, both are closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from expertmesh.routing.transport.session import TlsSession, read_into

log = logging.getLogger("expertmesh.tls")

_CHUNK_BYTES = 256 << 10
"""What is read at once: system calls cost more than the cipher, and beyond this nothing is gained."""
_RECORD_BYTES = 32 << 10
"""More than a record that was read in part before."""
_BUFFER_BYTES = 4 << 20
_LINGER_S = 5.0
"""How long what a closed end has said is tried to be delivered."""
_NOTHING = memoryview(b"")
_GONE = select.EPOLLHUP | select.EPOLLERR


def relayed(session: TlsSession) -> socket.socket:
    """A plain, non-blocking socket in the place of an open session, whose socket belongs to the relay from now on.

    Raises OSError if there are no descriptors left; the session's socket is the caller's then.
    """
    inside, outside = socket.socketpair()
    for sock in (inside, outside):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    try:
        session.sock.setblocking(False)
        _add(_Pipe(session, inside))
    except BaseException:
        inside.close()
        outside.close()
        raise
    return outside


class _Pipe:
    """One connection. Its methods raise OSError (of which SSLError is one) when it is over."""

    def __init__(self, session: TlsSession, inside: socket.socket) -> None:
        self.peer, self.inside = session.sock, inside
        self._tls, self._incoming, self._outgoing = session.tls, session.incoming, session.outgoing
        self._to_peer = self._to_inside = _NOTHING
        """What could not be written yet."""
        self._peer_said_all = self._inside_said_all = self._inside_is_gone = False
        self.flows = False
        """Whether epoll knows that both ends are read and nothing waits to be written, as nearly always."""
        self.give_up_at: float | None = None
        """`time.monotonic()` until which the last words of a plain end that is gone are tried to be delivered."""

    # -- from the peer ------------------------------------------------------------------------------------------

    def on_peer(self, events: int, room: memoryview) -> None:
        """Epoll has something about the TCP socket."""
        if events & select.EPOLLOUT:
            self._to_peer = _sent(self.peer, self._to_peer)
            self._close_if_done()
        if events & ~select.EPOLLOUT:
            if not self.wants_of_peer & select.EPOLLIN:  # it is said although nobody asked
                raise ConnectionResetError("the peer is gone")
            self._receive(room)

    def _receive(self, room: memoryview) -> None:
        got = self.peer.recv_into(room[:_CHUNK_BYTES])
        if not got:
            raise ConnectionResetError("the connection ended without TLS's farewell")
        self._incoming.write(room[:got])
        self.decrypt(room)

    def decrypt(self, room: memoryview) -> None:
        """Passes on all that is whole of what has come. room: of more bytes than can come at once, for any use."""
        filled = 0
        try:
            while filled < len(room):
                got = read_into(self._tls, room[filled:])
                if not got:
                    self._peer_said_all = True
                    break
                filled += got
                if not self._incoming.pending:  # asking on would cost an exception
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._peer_said_all = True
        if self._outgoing.pending:  # an answer of TLS itself
            self._queue_for_peer()
        if filled and not self._inside_is_gone:
            rest = _sent(self.inside, room[:filled])
            self._to_inside = memoryview(bytes(rest)) if rest else _NOTHING
        self._pass_on_farewell()

    def _pass_on_farewell(self) -> None:
        if self._peer_said_all and not self._to_inside:
            if not self._inside_is_gone:
                self.inside.shutdown(socket.SHUT_WR)
            self._close_if_done()

    # -- from inside --------------------------------------------------------------------------------------------

    def on_inside(self, events: int, room: memoryview) -> None:
        """Epoll has something about the plain socket."""
        if events & _GONE and self.give_up_at is None:
            self.give_up_at = time.monotonic() + _LINGER_S
        if events & select.EPOLLOUT:
            self._to_inside = _sent(self.inside, self._to_inside)
            self._pass_on_farewell()
        if events & ~select.EPOLLOUT and self.wants_of_inside & select.EPOLLIN:
            self._encrypt(room)
        if self._inside_said_all and self.give_up_at is not None:
            self._inside_is_gone = True
            self._to_inside = _NOTHING
            self._close_if_done()

    def _encrypt(self, room: memoryview) -> None:
        got = self.inside.recv_into(room[:_CHUNK_BYTES])
        if not got:
            self._inside_said_all = True
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()  # says farewell, and would like to hear one
        written = 0
        while written < got:
            written += self._tls.write(room[written:got])
        self._queue_for_peer()

    def _queue_for_peer(self) -> None:
        data = memoryview(self._outgoing.read())
        self._to_peer = memoryview(bytes(self._to_peer) + data) if self._to_peer else _sent(self.peer, data)

    # -- both ---------------------------------------------------------------------------------------------------

    @property
    def is_clear(self) -> bool:
        """Whether both ends are to be read and nothing is to be written."""
        over = self._peer_said_all or self._inside_said_all or self.give_up_at is not None
        return not (self._to_peer or self._to_inside or over)

    @property
    def wants_of_peer(self) -> int:
        """What epoll is to look for on the TCP socket."""
        more = not (self._to_inside or self._peer_said_all or self.give_up_at is not None)
        return (select.EPOLLIN if more else 0) | (select.EPOLLOUT if self._to_peer else 0)

    @property
    def wants_of_inside(self) -> int:
        """The same for the plain socket."""
        more = not (self._to_peer or self._inside_said_all)
        return (select.EPOLLIN if more else 0) | (select.EPOLLOUT if self._to_inside else 0)

    @property
    def listens_inside(self) -> bool:
        """Whether to hear that the plain end is gone, which epoll says again and again: once is enough."""
        return bool(self.wants_of_inside) or self.give_up_at is None

    def _close_if_done(self) -> None:
        over = self._inside_is_gone or (self._inside_said_all and self._peer_said_all)
        if over and not (self._to_peer or self._to_inside):
            raise _Done

    def close(self) -> None:
        """Closes both ends."""
        self.peer.close()
        self.inside.close()


class _Done(ConnectionError):
    """Everything was delivered."""


def _sent(sock: socket.socket, data: memoryview) -> memoryview:
    """Writes what the socket takes; the rest."""
    try:
        return data[sock.send(data) :] if data else data
    except BlockingIOError:
        return data


class _Relay:
    """The thread and what it watches."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self.fresh: list[_Pipe] = []
        self._pipes: set[_Pipe] = set()
        self._ends: dict[int, tuple[_Pipe, Callable[[int, memoryview], None]]] = {}
        self._watched: dict[int, int] = {}
        self._room = memoryview(bytearray(_CHUNK_BYTES + _RECORD_BYTES))
        self._late: set[_Pipe] = set()
        """Those that are given up after a while."""
        self.thread = threading.Thread(target=self._run, name="tls-relay", daemon=True)

    def wake(self) -> None:
        """There is a fresh pipe."""
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            while not _ended(self):
                self._turn()
        except BaseException:  # every connection is seen to be broken, and the next one gets another relay
            log.exception("the TLS relay ended")
            _forget(self)
            for pipe in (*self._pipes, *self.fresh):
                pipe.close()
        self._epoll.close()
        os.close(self._wake)

    def _turn(self) -> None:
        for fd, events in self._epoll.poll(_LINGER_S if self._late else None):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif (found := self._ends.get(fd)) is not None:
                pipe, act = found
                self._do(pipe, act, events)
        while self.fresh:
            self._take(self.fresh.pop())
        if self._late:
            self._give_up()

    @property
    def idle(self) -> bool:
        """Whether it carries nothing."""
        return not (self._pipes or self.fresh)

    def _take(self, pipe: _Pipe) -> None:
        self._pipes.add(pipe)
        self._ends[pipe.peer.fileno()] = pipe, pipe.on_peer
        self._ends[pipe.inside.fileno()] = pipe, pipe.on_inside
        self._do(pipe, lambda _, room: pipe.decrypt(room), 0)  # what came with the last words of the handshake

    def _do(self, pipe: _Pipe, act: Callable[[int, memoryview], None], events: int) -> None:
        try:
            act(events, self._room)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(pipe, error)
            return
        clear = pipe.is_clear
        if clear and pipe.flows:
            return
        pipe.flows = clear
        self._watch(pipe.peer.fileno(), pipe.wants_of_peer, True)
        self._watch(pipe.inside.fileno(), pipe.wants_of_inside, pipe.listens_inside)
        if pipe.give_up_at is not None:
            self._late.add(pipe)

    def _watch(self, fd: int, events: int, listens: bool) -> None:
        known = self._watched.get(fd)
        wanted = events if listens else None
        if wanted == known:
            return
        if wanted is None:
            self._epoll.unregister(fd)
            del self._watched[fd]
            return
        if known is None:
            self._epoll.register(fd, wanted)
        else:
            self._epoll.modify(fd, wanted)
        self._watched[fd] = wanted

    def _drop(self, pipe: _Pipe, why: OSError) -> None:
        if isinstance(why, ssl.SSLError):
            log.warning("a TLS connection is broken off: %s", why)
        elif not isinstance(why, _Done):
            log.debug("a TLS connection is over: %s", why)
        for end in (pipe.peer, pipe.inside):
            fd = end.fileno()
            self._ends.pop(fd, None)
            self._watch(fd, 0, False)
        self._pipes.discard(pipe)
        self._late.discard(pipe)
        pipe.close()

    def _give_up(self) -> None:
        now = time.monotonic()
        for pipe in [p for p in self._late if p.give_up_at is not None and p.give_up_at <= now]:
            self._drop(pipe, TimeoutError("its last words were not taken"))


_lock = threading.Lock()
_relay: _Relay | None = None


def _add(pipe: _Pipe) -> None:
    global _relay
    with _lock:
        relay = _relay
        if relay is None:
            relay = _relay = _Relay()
            relay.thread.start()
        relay.fresh.append(pipe)
        relay.wake()


def _ended(relay: _Relay) -> bool:
    """Whether a relay has nothing to do any more, and so isn't the process' one from now on."""
    global _relay
    if not relay.idle:
        return False
    with _lock:
        if not relay.idle:
            return False
        _relay = None
        return True


def _forget(relay: _Relay) -> None:
    global _relay
    with _lock:
        if _relay is relay:
            _relay = None


def _start_over() -> None:
    """A forked process has no thread, and a lock that another thread may have held."""
    global _relay, _lock
    _relay, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_start_over)
