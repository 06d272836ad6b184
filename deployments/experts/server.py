"""The data plane of a shard: reads dispatch frames, computes those that wait together as one batch, answers.

One thread owns the connections and runs the kernel, so a frame costs no hand-over between threads; only handshakes,
which may be slow, happen elsewhere. A connection that breaks the protocol is closed and the others go on.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from expertmesh.deployments.experts.connection import Connection
from expertmesh.errors import WireError
from expertmesh.routing.transport import Door, Peer, Tls
from expertmesh.routing.transport.sockets import accepted
from expertmesh.routing.wire import Limits
from expertmesh.routing.wire.frame import DispatchBody

log = logging.getLogger("expertmesh.experts")

_ACCEPT_PAUSE_S = 0.1
"""How long no connection is accepted after the process ran out of descriptors or memory for one."""
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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
    waited_s: float = 0.0
    """Seconds that answered frames waited before they were computed, added up."""
    refused: int = 0
    """Frames answered with an error."""
    connections: int = 0
    """Open now."""
    layer_pairs: dict[int, int] = field(default_factory=dict)
    """`pairs` by the model's layer number."""
    stuck_s: float = 0.0
    """How long the kernel call at hand has taken, if there is one."""


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
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        tls: Tls | None = None,
    ) -> None:
        """tls: what clients from other nodes must use; clock_ns: what computing and waiting are measured with, in
        nanoseconds."""
        self.epoch = 0
        """Placement epoch that answers carry; set by the owner."""
        self._listeners = {sock.fileno(): sock for sock in listeners}
        self._me = me
        self._dtype: torch.dtype = getattr(torch, me.dtype)
        self._kernel = kernel
        self._limits = limits
        self._max_batch_rows = max_batch_rows
        self._clock_ns = clock_ns
        self._turn_began_ns = clock_ns()
        self._connections: dict[int, Connection] = {}
        self.door = Door(secret, tls, log)
        self._fresh: deque[socket.socket] = deque()
        self._unread: list[Connection] = []
        """Those with more than one frame in their buffer, of which epoll knows nothing."""
        self._epoll = select.epoll()
        self._resume_at: float | None = None
        """`time.monotonic()` from which on connections are accepted again, if they are not now."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="data-plane", daemon=True)
        self._frames = self._batches = self._pairs = self._refused = self._busy_ns = self._waited_ns = 0
        self._layer_pairs: dict[int, int] = {}
        self._computing_since_ns: int | None = None
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
        self.door.close()
        self._close_sockets()
        self._epoll.close()
        os.close(self._wake)

    def _close_sockets(self) -> None:
        while self._fresh:
            self._fresh.popleft().close()
        for connection in self._connections.values():
            connection.close()
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
        since_ns = self._computing_since_ns
        return ServerStats(
            frames=self._frames,
            batches=self._batches,
            pairs=self._pairs,
            busy_s=self._busy_ns / 1e9,
            waited_s=self._waited_ns / 1e9,
            refused=self._refused,
            connections=len(self._connections),
            layer_pairs=dict(self._layer_pairs),
            stuck_s=0.0 if since_ns is None else (self._clock_ns() - since_ns) / 1e9,
        )

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
        except BaseException as error:  # the replica's health check reports it and Serve restarts the shard
            self.failure = error
            log.exception("data plane of shard %s ended", self._me.shard)
        finally:
            self._close_sockets()  # dispatchers see it at once and go elsewhere

    def _turn(self) -> None:
        events = self._epoll.poll(0)
        now = self._clock_ns()
        earliest = self._turn_began_ns  # of what came while the last turn was busy
        if not events and not self._unread:
            events = self._epoll.poll(None if self._resume_at is None else _ACCEPT_PAUSE_S)
            earliest = now = self._clock_ns()
        self._turn_began_ns = now
        readable = dict.fromkeys(self._unread)
        for fd, event in events:
            connection = self._connections.get(fd)
            if connection is None:
                self._meet(fd)
                continue
            if event & select.EPOLLOUT:
                self._write(connection, Connection.flush)
            if event & ~select.EPOLLOUT:
                readable[connection] = None
        if self._resume_at is not None:
            self._resume_accepting()
        # One frame each, so that nobody who sends many keeps the others waiting.
        jobs = [connection for connection in readable if self._has_frame(connection, earliest, now)]
        if len(jobs) == 1:
            self._serve(jobs)
        elif jobs:
            self._serve_all(jobs)
        self._unread = [c for c in jobs if c.stream.has_input and c.sock.fileno() in self._connections]

    def _has_frame(self, connection: Connection, earliest: int, now: int) -> bool:
        # When it came nobody knows, but that it was later than the answer to the one before: in the middle, on average.
        connection.arrived_ns = (max(earliest, connection.answered_ns) + now) // 2
        try:
            return connection.receive()
        except WireError as error:
            self._close(connection, error)
            return False

    def _serve_all(self, jobs: list[Connection]) -> None:
        by_layer: dict[int, list[Connection]] = {}
        for job in jobs:
            by_layer.setdefault(job.stream.layer, []).append(job)
        for group in by_layer.values():
            for batch in _batches(group, self._max_batch_rows):
                self._serve(batch)

    def _serve(self, batch: list[Connection]) -> None:
        layer = batch[0].stream.layer
        body = batch[0].body if len(batch) == 1 else _joined([job.body for job in batch])
        begin = self._computing_since_ns = self._clock_ns()
        try:
            y = self._kernel.compute(layer, body)
            _check_output(y, body.x)
        except Exception as error:  # whatever a kernel raises concerns this batch only
            if len(batch) > 1:  # one frame's fault must not fail the others
                for job in batch:
                    self._serve([job])
                return
            if not isinstance(error, NotHeld):
                log.exception("layer %d failed on shard %s", layer, self._me.shard)
            self._refused += 1
            message = f"{type(error).__name__}: {error}"
            self._write(batch[0], Connection.refuse, 1, message, self.epoch)
            return
        finally:
            self._computing_since_ns = None
        end = self._clock_ns()
        pairs = sum(job.stream.pairs for job in batch) if len(batch) > 1 else batch[0].stream.pairs
        self._busy_ns += end - begin
        self._batches += 1
        self._frames += len(batch)
        self._pairs += pairs
        self._layer_pairs[layer] = self._layer_pairs.get(layer, 0) + pairs
        at = 0
        for job in batch:
            job.answered_ns = end
            computed = (end - begin) * job.stream.pairs // pairs
            waited = end - job.arrived_ns - computed
            self._waited_ns += waited
            self._write(job, Connection.answer, y, at, self.epoch, computed // 1000, waited // 1000)
            at += job.stream.rows

    def _write(self, connection: Connection, action: Callable[..., None], *arguments: Any) -> None:
        """Does what writes, and asks epoll for room in the socket just as long as there is something to write."""
        stream = connection.stream
        had = stream.unsent > 0
        try:
            action(connection, *arguments)
        except WireError as error:
            self._close(connection, error)
            return
        has = stream.unsent > 0
        if has is not had:
            self._epoll.modify(connection.sock, select.EPOLLIN | (select.EPOLLOUT if has else 0))

    def _close(self, connection: Connection, why: WireError) -> None:
        log.debug("connection closed: %s", why)
        fd = connection.sock.fileno()
        if self._connections.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            connection.close()

    # -- connecting ---------------------------------------------------------------------------------------------

    def _meet(self, fd: int) -> None:
        """A new client, or one whose handshake is over."""
        listener = self._listeners.get(fd)
        if listener is not None:
            self._accept(listener)
        elif fd == self._wake:
            os.eventfd_read(self._wake)
            self._admit()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock = accepted(listener)
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            log.error("no connection accepted for %g s: %s", _ACCEPT_PAUSE_S, error)
            self._pause_accepting()
            return
        self.door.greet(sock, self._me, self._welcome)

    def _pause_accepting(self) -> None:
        for fd in self._listeners:  # a client that waits would wake this thread all the time
            self._epoll.modify(fd, 0)
        self._resume_at = time.monotonic() + _ACCEPT_PAUSE_S

    def _resume_accepting(self) -> None:
        if self._resume_at is not None and time.monotonic() >= self._resume_at:
            self._resume_at = None
            for fd in self._listeners:
                self._epoll.modify(fd, select.EPOLLIN)

    def _welcome(self, sock: socket.socket) -> None:
        self._fresh.append(sock)
        os.eventfd_write(self._wake, 1)

    def _admit(self) -> None:
        while self._fresh:
            sock = self._fresh.popleft()
            self._connections[sock.fileno()] = Connection(sock, self._me.width, self._dtype, self._limits)
            self._epoll.register(sock, select.EPOLLIN)


def _check_output(y: torch.Tensor, x: torch.Tensor) -> None:
    """Raises RuntimeError unless y can be sent as the answer to x: its bytes are read where they lie."""
    if y.nbytes != x.nbytes or y.dtype is not x.dtype or not (y.is_cpu and y.is_contiguous()):
        raise RuntimeError(f"the kernel answered {tuple(x.shape)} in {x.dtype} with {tuple(y.shape)} in {y.dtype}")


def _batches(group: list[Connection], max_rows: int) -> list[list[Connection]]:
    """Splits frames of one layer into batches of at most `max_rows` rows, at least one frame each."""
    batches: list[list[Connection]] = []
    rows = max_rows + 1
    for job in group:
        rows += job.stream.rows
        if rows > max_rows:
            batches.append([])
            rows = job.stream.rows
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
