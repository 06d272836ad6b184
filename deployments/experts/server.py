"""The data plane of a shard: reads dispatch frames, computes those that wait together as one batch, answers.

One thread owns the connections and runs the kernel, so a frame costs no hand-over between threads; only handshakes,
which may be slow, happen elsewhere. A connection that breaks the protocol is closed and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from expertmesh.deployments.experts.connection import Connection
from expertmesh.errors import WireError
from expertmesh.routing.transport import Peer, challenge
from expertmesh.routing.transport.sockets import accepted
from expertmesh.routing.wire import (
    Header,
    Kind,
    Limits,
    combine_parts,
    dtype_code,
    error_parts,
    parse_dispatch,
)
from expertmesh.routing.wire.frame import Buffer, DispatchBody

log = logging.getLogger("expertmesh.experts")

_HANDSHAKE_TIMEOUT_S = 5.0
_HANDSHAKE_THREADS = 4


class Kernel(Protocol):
    """What computes experts."""

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """y [R, H], contiguous, in x's dtype: for each row the weighted sum over the pairs that name it.

        y must not share memory with body, whose buffer may be filled again before y is sent.

        Raises NotHeld if an expert of the frame is not here.
        """


class NotHeld(Exception):
    """A frame asked for an expert that this shard does not hold (its placement is older or newer than ours)."""


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Counters since the start."""

    frames: int = 0
    batches: int = 0
    """Kernel calls: fewer than frames where requests waited together."""
    pairs: int = 0
    """(token, expert) pairs computed."""
    busy_s: float = 0.0
    """Seconds spent in the kernel."""
    refused: int = 0
    """Frames answered with an error."""
    connections: int = 0
    """Open now."""


_Job = tuple[Connection, Header, DispatchBody]


class FrameServer:
    """Serves `kernel` on `listeners` from a thread of its own, from `start` to `stop`."""

    def __init__(
        self,
        listeners: Iterable[socket.socket],
        secret: bytes,
        me: Peer,
        kernel: Kernel,
        limits: Limits,
        max_batch_rows: int = 8192,
    ) -> None:
        self.epoch = 0
        """Placement epoch that answers carry; set by the owner."""
        self._listeners = {sock.fileno(): sock for sock in listeners}
        self._secret = secret
        self._me = me
        self._dtype = dtype_code(getattr(torch, me.dtype))
        self._kernel = kernel
        self._limits = limits
        self._max_batch_rows = max_batch_rows
        self._connections: dict[int, Connection] = {}
        self._greeting: set[socket.socket] = set()
        self._fresh: deque[socket.socket] = deque()
        self._unread: list[Connection] = []
        """Those with more than one frame in their buffer, of which epoll knows nothing."""
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self._stopped = False
        self._handshakes = ThreadPoolExecutor(_HANDSHAKE_THREADS, thread_name_prefix="handshake")
        self._thread = threading.Thread(target=self._run, name="data-plane", daemon=True)
        self._frames = self._batches = self._pairs = self._refused = self._busy_ns = 0
        self.failure: BaseException | None = None
        """What ended the thread, if it was not `stop`."""

    def start(self) -> None:
        """Begins to answer."""
        for fd, sock in self._listeners.items():
            sock.setblocking(False)
            self._epoll.register(fd, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the batch at hand and closes every socket; does nothing the second time."""
        if self._stopped:
            return
        self._stopped = self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for sock in list(self._greeting):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends its handshake now instead of at the timeout
        self._handshakes.shutdown(cancel_futures=True)
        self._close_sockets()
        for sock in self._greeting:
            sock.close()
        self._epoll.close()
        os.close(self._wake)

    def _close_sockets(self) -> None:
        while self._fresh:
            self._fresh.popleft().close()
        for connection in self._connections.values():
            connection.sock.close()
        self._connections.clear()
        for sock in self._listeners.values():
            sock.close()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def stats(self) -> ServerStats:
        """The counters now."""
        return ServerStats(
            self._frames, self._batches, self._pairs, self._busy_ns / 1e9, self._refused, len(self._connections)
        )

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn(self._epoll.poll(0 if self._unread else None))
        except BaseException as error:  # the replica's health check reports it and Serve restarts the shard
            self.failure = error
            log.exception("data plane of shard %s ended", self._me.shard)
        finally:
            self._close_sockets()  # dispatchers see it at once and go elsewhere

    def _turn(self, events: list[tuple[int, int]]) -> None:
        readable = dict.fromkeys(self._unread)
        for fd, event in events:
            if fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd == self._wake:
                os.eventfd_read(self._wake)
                self._admit()
            elif (connection := self._connections.get(fd)) is not None:
                if event & select.EPOLLOUT:
                    self._write(connection, connection.flush)
                if event & ~select.EPOLLOUT:
                    readable[connection] = None
        jobs: list[_Job] = []
        for connection in readable:  # one frame each, so that nobody who sends many keeps the others waiting
            self._take(connection, jobs)
        by_layer: dict[int, list[_Job]] = {}
        for job in jobs:
            by_layer.setdefault(job[1].layer, []).append(job)
        for group in by_layer.values():
            for batch in _batches(group, self._max_batch_rows):
                self._serve(batch)
        self._unread = [c for c, _, _ in jobs if c.has_input and c.sock.fileno() in self._connections]

    def _take(self, connection: Connection, jobs: list[_Job]) -> None:
        try:
            frame = connection.receive()
            if frame is None:
                return
            header, body = frame
            if header.kind is not Kind.DISPATCH:
                raise WireError(f"client sent a frame of kind {header.kind.name}")
            if header.width != self._me.width or header.dtype != self._dtype:
                raise WireError(
                    f"frame of width {header.width}, dtype code {header.dtype}; this shard serves {self._me}"
                )
            jobs.append((connection, header, parse_dispatch(header, body)))
        except WireError as error:
            self._close(connection, error)

    def _serve(self, batch: list[_Job]) -> None:
        layer = batch[0][1].layer
        body = batch[0][2] if len(batch) == 1 else _joined([job[2] for job in batch])
        begin = time.perf_counter_ns()
        try:
            y = self._kernel.compute(layer, body)
        except Exception as error:  # whatever a kernel raises concerns this batch only
            if len(batch) > 1:  # one frame's fault must not fail the others
                for job in batch:
                    self._serve([job])
                return
            if not isinstance(error, NotHeld):
                log.exception("layer %d failed on shard %s", layer, self._me.shard)
            self._refused += 1
            connection, header, _ = batch[0]
            self._reply(connection, error_parts(header, 1, f"{type(error).__name__}: {error}", self.epoch))
            return
        self._busy_ns += time.perf_counter_ns() - begin
        self._batches += 1
        self._frames += len(batch)
        self._pairs += len(body.experts)
        at = 0
        for connection, header, _ in batch:
            self._reply(connection, combine_parts(header, y[at : at + header.rows], self.epoch))
            at += header.rows

    def _reply(self, connection: Connection, parts: Sequence[Buffer]) -> None:
        self._write(connection, lambda: connection.send(parts))

    def _write(self, connection: Connection, action: Callable[[], None]) -> None:
        """Does what writes, and asks epoll for room in the socket just as long as there is something to write."""
        had = bool(connection.outbox)
        self._guard(connection, action)
        if bool(connection.outbox) != had and connection.sock.fileno() in self._connections:
            self._epoll.modify(connection.sock, select.EPOLLIN | (select.EPOLLOUT if connection.outbox else 0))

    def _guard(self, connection: Connection, action: Callable[[], None]) -> None:
        try:
            action()
        except WireError as error:
            self._close(connection, error)

    def _close(self, connection: Connection, why: WireError) -> None:
        log.debug("connection closed: %s", why)
        fd = connection.sock.fileno()
        if self._connections.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            connection.sock.close()

    # -- connecting ---------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock = accepted(listener)
            self._greeting.add(sock)
            self._handshakes.submit(self._greet, sock)

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_HANDSHAKE_TIMEOUT_S)
            challenge(sock, self._secret, self._me)
            sock.setblocking(False)
        except (OSError, WireError) as error:
            log.warning("connection refused: %s", error)
            self._greeting.discard(sock)
            sock.close()
            return
        self._fresh.append(sock)
        self._greeting.discard(sock)
        os.eventfd_write(self._wake, 1)

    def _admit(self) -> None:
        while self._fresh:
            sock = self._fresh.popleft()
            self._connections[sock.fileno()] = Connection(sock, self._limits)
            self._epoll.register(sock, select.EPOLLIN)


def _batches(group: list[_Job], max_rows: int) -> list[list[_Job]]:
    """Splits frames of one layer into batches of at most `max_rows` rows, at least one frame each."""
    batches: list[list[_Job]] = []
    rows = max_rows + 1
    for job in group:
        rows += job[1].rows
        if rows > max_rows:
            batches.append([])
            rows = job[1].rows
        batches[-1].append(job)
    return batches


def _joined(bodies: Sequence[DispatchBody]) -> DispatchBody:
    """One body of all rows and pairs, in order."""
    starts = [0]
    for body in bodies[:-1]:
        starts.append(starts[-1] + len(body.x))
    return DispatchBody(
        torch.cat([body.x for body in bodies]),
        torch.cat([body.experts for body in bodies]),
        torch.cat([body.rows + start for body, start in zip(bodies, starts, strict=True)]),
        torch.cat([body.weights for body in bodies]),
    )
