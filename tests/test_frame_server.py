"""The shard's data plane with clients that behave badly, over real sockets."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.deployments.experts.server import FrameServer, NotHeld
from expertmesh.errors import WireError
from expertmesh.routing.transport import Peer, TlsSettings, connect, listen
from expertmesh.routing.transport.sockets import Address
from expertmesh.routing.wire import HEADER_BYTES, Header, Kind, Limits, parse_combine, parse_error
from expertmesh.routing.wire.frame import DispatchBody
from tests.routing.certificates import Authority, write
from tests.routing.harness import (
    EXPERTS,
    LAYERS,
    REVISION,
    SECRET,
    WIDTH,
    ReferenceExperts,
    RunningServer,
    TorchKernel,
    data_plane_threads,
    eventually,
    read_frame,
    request_parts,
    started_servers,
)

LAYER = LAYERS[0]
LIMITS = Limits(max_rows=512, max_bytes=64 << 20, max_pairs_per_row=8)
X = torch.arange(3 * WIDTH).view(3, WIDTH).float()

Serve = Callable[..., RunningServer]
Open = Callable[[RunningServer], socket.socket]


class Picky(TorchKernel):
    """Fails, in a way of the caller's choice, if expert 5 is among the experts."""

    error: Exception = RuntimeError("expert 5 is broken")

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`, or raises."""
        y = super().compute(layer, body)
        if 5 in body.experts:
            raise self.error
        return y


def everything(kind: type[TorchKernel] = TorchKernel) -> TorchKernel:
    """A kernel that holds every expert."""
    return kind(ReferenceExperts(), {layer: set(range(EXPERTS)) for layer in LAYERS})


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    return write(tmp_path_factory.mktemp("tls"), Authority())


@pytest.fixture
def serve(member: TlsSettings) -> Iterator[Serve]:
    """Starts servers; stops them after the test and checks that nothing is left. `tls` is a family."""
    with started_servers() as servers:

        def start(kernel: Any = None, **options: Any) -> RunningServer:
            if options.get("family") == "tls":
                options.update(family="tcp", tls=member)
            servers.append(RunningServer(kernel or everything(), **{"limits": LIMITS, **options}))
            return servers[-1]

        yield start


@pytest.fixture
def open_client() -> Iterator[Open]:
    """Authenticated, blocking client sockets."""
    with contextlib.ExitStack() as stack:

        def open_one(server: RunningServer) -> socket.socket:
            sock, _ = connect(server.address, SECRET, 10, server.tls)
            stack.enter_context(sock)
            sock.settimeout(10)
            return sock

        yield open_one


def ask(sock: socket.socket, *, frame: int = 1, experts: tuple[int, ...] = (0, 1, 2), layer: int = LAYER) -> None:
    sock.sendall(request_parts(X, list(experts), [0, 1, 2], layer=layer, frame=frame))


def is_right(sock: socket.socket, *, frame: int = 1, experts: tuple[int, ...] = (0, 1, 2)) -> bool:
    """Whether the next frame is the answer to `ask`."""
    header, body = read_frame(sock)
    want = torch.cat([ReferenceExperts().one(LAYER, e, X[[row]]) for row, e in enumerate(experts)])
    assert (header.kind, header.layer, header.frame) == (Kind.COMBINE, LAYER, frame)
    return torch.equal(parse_combine(header, memoryview(body)), want)


def open_files() -> set[str]:
    """This process' descriptors and what they are."""
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def is_closed(sock: socket.socket) -> bool:
    """Whether the server hangs up, now or soon."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def good(**changes: Any) -> bytes:
    """A dispatch header, with changes."""
    fields = {"kind": Kind.DISPATCH, "dtype": 1, "layer": LAYER, "rows": 3, "pairs": 3, "width": WIDTH, "epoch": 0}
    return Header(**{**fields, "frame": 1, **changes}).pack()


BAD = {
    "garbage": b"GET / HTTP/1.1\r\nHost: shard\r\nAccept: application/json\r\n\r\n",
    "too many rows": good(rows=513, pairs=513),
    "too many pairs": good(pairs=25),
    "too many bytes": good(rows=512, pairs=512, width=40_000),
    "no rows": good(rows=0),
    "another width": good(width=2 * WIDTH) + bytes(3 * 4 * 2 * WIDTH + 36),
    "another dtype": good(dtype=2) + bytes(3 * 2 * WIDTH + 36),
    "an answer": good(kind=Kind.COMBINE, pairs=0) + bytes(3 * 4 * WIDTH),
    "an error": Header(Kind.ERROR, 0, LAYER, 3, 1, 0, 0, 1).pack() + b"bad",
    "a row that isn't there": request_parts(X, [0, 1, 2], [0, 1, 3]),
    "a negative row": request_parts(X, [0, 1, 2], [0, -1, 2]),
}


@pytest.mark.parametrize("kind", sorted(BAD))
@pytest.mark.parametrize("family", ["unix", "tcp", "tls"])
def test_a_malformed_frame_closes_its_connection_and_no_other(
    serve: Serve, open_client: Open, kind: str, family: str
) -> None:
    server = serve(family=family)
    bad, fine = open_client(server), open_client(server)
    ask(bad)
    assert is_right(bad)
    with contextlib.suppress(ConnectionError):
        bad.sendall(BAD[kind])
    assert is_closed(bad)
    ask(fine)
    assert is_right(fine)
    eventually(lambda: server.server.stats.connections == 1, "the bad one is forgotten")


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_frames_behind_a_good_one_in_the_same_packet(serve: Serve, open_client: Open, family: str) -> None:
    server = serve(family=family)
    sock = open_client(server)
    pieces = [request_parts(X, [0, 1, 2], [0, 1, 2], frame=frame) for frame in range(1, 8)]
    sock.sendall(b"".join(pieces) + pieces[0][:70])
    assert all(is_right(sock, frame=frame) for frame in range(1, 8))
    sock.sendall(pieces[0][70:] + BAD["garbage"])
    assert is_right(sock, frame=1)
    assert is_closed(sock)


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_a_client_that_drips_stalls_nobody(serve: Serve, open_client: Open, family: str) -> None:
    server = serve(family=family)
    slow, fast = open_client(server), open_client(server)
    data = request_parts(X, [0, 1, 2], [0, 1, 2])
    for at in range(len(data)):
        slow.sendall(data[at : at + 1])
        if at % 20 == 0:
            ask(fast, frame=at)
            assert is_right(fast, frame=at)
    assert is_right(slow)


def test_clients_that_do_not_finish_the_handshake_stall_nobody_who_has(serve: Serve, open_client: Open) -> None:
    server = serve()
    fine = open_client(server)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            silent.connect("\0" + server.address.name)
        for frame in range(50):
            ask(fine, frame=frame)
            assert is_right(fine, frame=frame)
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 2, "stop waited for handshakes"
        assert not data_plane_threads()


def test_silent_clients_do_not_keep_others_from_connecting(serve: Serve, open_client: Open) -> None:
    """Many more than handshakes that run at once: the oldest are given up, at once and not after their timeout."""
    server = serve()
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(3):
            for _ in range(40):
                silent.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
                silent[-1].settimeout(10)
                silent[-1].connect("\0" + server.address.name)
            sock, _ = connect(server.address, SECRET, 4)  # less than a handshake may take
            stack.enter_context(sock).settimeout(10)
            ask(sock)
            assert is_right(sock)
        eventually(lambda: server.server.door.waiting == 63, "the newest are still waited for")
        silent[0].recv(4096)  # the challenge
        assert is_closed(silent[0])


def test_a_process_without_descriptors_serves_on_and_accepts_later(serve: Serve, open_client: Open) -> None:
    server = serve()
    fine = open_client(server)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        late = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        late.settimeout(10)
        lowest = os.dup(0)  # the lowest free number: none is free below it while it is open
        stack.callback(os.close, lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            late.connect("\0" + server.address.name)
            eventually(lambda: server.server._resume_at is not None, "accept fails")
            for frame in range(50):
                ask(fine, frame=frame)
                assert is_right(fine, frame=frame)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert late.recv(4) == b"XMA1"
        assert server.server.alive


def test_a_client_without_the_secret_gets_no_answer(serve: Serve, open_client: Open) -> None:
    server = serve()
    with pytest.raises(WireError, match="secrets differ"):
        connect(server.address, b"a guess", 5)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect("\0" + server.address.name)
        sock.sendall(request_parts(X, [0, 1, 2], [0, 1, 2]))
        sock.recv(4096)  # the challenge
        assert is_closed(sock)
    assert server.server.stats.frames == 0
    fine = open_client(server)
    ask(fine)
    assert is_right(fine)


def test_what_a_kernel_raises_is_answered_and_the_server_lives_on(serve: Serve, open_client: Open) -> None:
    server = serve(everything(Picky))
    sock = open_client(server)
    server.server.epoch = 17
    for frame, experts in enumerate([(0, 5, 1), (0, 1, 2), (5, 5, 5)]):
        ask(sock, frame=frame, experts=experts)
        if 5 not in experts:
            assert is_right(sock, frame=frame, experts=experts)
            continue
        header, body = read_frame(sock)
        assert (header.kind, header.frame, header.epoch, header.pairs) == (Kind.ERROR, frame, 17, 1)
        assert parse_error(header, body) == "RuntimeError: expert 5 is broken"
    stats = server.server.stats
    assert (stats.frames, stats.refused, stats.connections) == (1, 2, 1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (NotHeld("experts [5]"), "NotHeld: experts [5]"),
        (ValueError("\ud800"), "ValueError: ?"),
        (RuntimeError("x" * 10_000), "RuntimeError: " + "x" * 4082),
        (StopIteration(), "StopIteration: "),
    ],
)
def test_words_of_any_kind_are_answered(serve: Serve, open_client: Open, error: Exception, says: str) -> None:
    kernel = everything(Picky)
    assert isinstance(kernel, Picky)
    kernel.error = error
    sock = open_client(serve(kernel))
    ask(sock, experts=(5, 5, 5))
    header, body = read_frame(sock)
    assert parse_error(header, body) == says
    ask(sock)
    assert is_right(sock)


class Misshapen:
    """Answers with what can't be sent: too few rows, another dtype, or in pieces."""

    def __init__(self, y: torch.Tensor) -> None:
        self.y = y

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`, but wrong."""
        return self.y


@pytest.mark.parametrize(
    "y",
    [X[:2], X.double(), X.view(torch.int32), X.t().contiguous().t(), torch.empty(3, WIDTH, device="meta")],
    ids=["too few rows", "too many bytes", "another dtype", "not contiguous", "not here"],
)
def test_a_kernels_output_is_checked_before_its_bytes_are_read(
    serve: Serve, open_client: Open, y: torch.Tensor
) -> None:
    sock = open_client(serve(Misshapen(y)))
    ask(sock)
    header, body = read_frame(sock)
    assert header.kind is Kind.ERROR
    assert "the kernel answered (3, 16) in torch.float32 with" in parse_error(header, body)


class Clock:
    """A clock that only kernels advance."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        """Nanoseconds."""
        return self.ns


class Gathered:
    """Frames of several clients that all wait when the kernel becomes free."""

    def __init__(self, server: RunningServer, open_client: Open, clients: int) -> None:
        assert isinstance(server.kernel, TorchKernel)
        self.kernel = server.kernel
        self._server = server
        self._first = open_client(server)
        self.clients = [open_client(server) for _ in range(clients)]
        eventually(lambda: server.server.stats.connections == clients + 1, "all connected")

    @contextlib.contextmanager
    def while_it_computes(self) -> Iterator[None]:
        """Keeps the kernel busy with a frame of another client."""
        self.kernel.entered.clear()
        self.kernel.gate.clear()
        ask(self._first)
        assert self.kernel.entered.wait(10)
        self.kernel.calls.clear()
        try:
            yield
        finally:
            self.kernel.gate.set()
        assert is_right(self._first)


class Timed(TorchKernel):
    """Takes 3 ms for every call."""

    clock: Clock

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`."""
        self.clock.ns += 3_000_000
        return super().compute(layer, body)


def test_answers_tell_what_was_computed_and_waited(serve: Serve, open_client: Open) -> None:
    """Frames that come while another is computed have waited half of that; in a batch each has its part."""
    kernel = everything(Timed)
    assert isinstance(kernel, Timed)
    kernel.clock = Clock()
    server = serve(kernel, clock_ns=kernel.clock)
    gathered = Gathered(server, open_client, 3)
    with gathered.while_it_computes():
        for frame, sock in enumerate(gathered.clients):
            ask(sock, frame=frame, layer=LAYERS[frame == 2])
    answers = [read_frame(sock)[0] for sock in gathered.clients]
    assert [answer.computed_us for answer in answers] == [1500, 1500, 3000]
    assert [answer.waited_us for answer in answers] == [3000, 3000, 4500]
    stats = server.server.stats
    assert stats.waited_s == pytest.approx(0.0105)
    assert stats.busy_s == pytest.approx(0.009)
    assert sum(stats.layer_pairs.values()) == stats.pairs


def test_a_bad_frame_among_good_ones_fails_alone(serve: Serve, open_client: Open) -> None:
    server = serve(everything(Picky))
    gathered = Gathered(server, open_client, 3)
    with gathered.while_it_computes():
        for frame, sock in enumerate(gathered.clients):
            ask(sock, frame=frame, experts=(0, 5, 1) if frame == 1 else (0, 1, frame))
    assert is_right(gathered.clients[0], frame=0, experts=(0, 1, 0))
    assert is_right(gathered.clients[2], frame=2, experts=(0, 1, 2))
    header, _ = read_frame(gathered.clients[1])
    assert (header.kind, header.frame) == (Kind.ERROR, 1)
    assert gathered.kernel.calls[0] == (LAYER, 9), "they were not batched at all"


def test_batches_are_split_by_rows_and_by_layer(serve: Serve, open_client: Open) -> None:
    server = serve(max_batch_rows=7)
    gathered = Gathered(server, open_client, 6)
    with gathered.while_it_computes():
        for frame, sock in enumerate(gathered.clients):
            ask(sock, frame=frame, layer=LAYERS[frame == 2], experts=(frame, 1, 2))
    for frame, sock in enumerate(gathered.clients):
        if frame == 2:
            assert read_frame(sock)[0].layer == LAYERS[1]
        else:
            assert is_right(sock, frame=frame, experts=(frame, 1, 2))
    assert sorted(gathered.kernel.calls) == [(LAYERS[0], 3), (LAYERS[0], 6), (LAYERS[0], 6), (LAYERS[1], 3)]
    stats = server.server.stats
    assert (stats.frames, stats.batches, stats.pairs) == (7, 5, 21)
    assert stats.busy_s > 0


def test_a_frame_larger_than_a_batch_is_computed_alone(serve: Serve, open_client: Open) -> None:
    server = serve(max_batch_rows=2)
    sock = open_client(server)
    ask(sock)
    assert is_right(sock)
    assert server.server.stats.batches == 1


def test_a_client_that_pipelines_without_end_keeps_nobody_waiting(serve: Serve, open_client: Open) -> None:
    server = serve()
    greedy, modest = open_client(server), open_client(server)
    one = request_parts(X, [0, 1, 2], [0, 1, 2])
    stop = threading.Event()

    def flood() -> None:
        piece = memoryview(one * 200)
        with contextlib.suppress(OSError):
            while not stop.is_set():
                rest = piece
                while rest and not stop.is_set():
                    select.select([], [greedy], [], 0.1)
                    rest = rest[greedy.send(rest) :]

    def drain() -> None:
        with contextlib.suppress(OSError):
            while greedy.recv(1 << 20):
                pass

    threads = [threading.Thread(target=flood), threading.Thread(target=drain)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: server.server.stats.frames > 500, "the flood runs")
        for frame in range(5):
            ask(modest, frame=frame)
            assert is_right(modest, frame=frame)
    finally:
        stop.set()
        greedy.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)


class Wide:
    """Answers with the rows as they came."""

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`."""
        return body.x.clone()


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_many_unread_answers_are_kept_and_then_the_server_rests(serve: Serve, open_client: Open, family: str) -> None:
    """2,000 answers of 16 KB to a client that reads nothing yet: far more buffers than one system call takes."""
    server = serve(Wide(), width=4096, family=family)
    sock, other = open_client(server), open_client(server)
    frames = 2000
    x = torch.arange(4096).float().view(1, 4096)

    def send() -> None:
        for frame in range(frames):
            sock.sendall(request_parts(x, [0], [0], frame=frame))

    sender = threading.Thread(target=send)
    sender.start()
    eventually(lambda: server.server.stats.frames == frames, "all computed", 30)
    sender.join()
    other.sendall(request_parts(x, [0], [0]))
    read_frame(other)
    for frame in range(frames):
        header, body = read_frame(sock)
        assert header.frame == frame
        assert torch.equal(parse_combine(header, memoryview(body)), x)

    def asks_for_room() -> bool:
        """Whether epoll is to say when a socket takes bytes, which is always: it would never block."""
        watched = Path(f"/proc/self/fdinfo/{server.server._epoll.fileno()}").read_text()
        events = [int(line.split()[3], 16) for line in watched.splitlines() if line.startswith("tfd:")]
        assert len(events) == 4  # listener, wake-up, two clients
        return any(event & select.EPOLLOUT for event in events)

    eventually(lambda: not asks_for_room(), "the data plane rests", 2)


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_a_client_that_never_reads_is_dropped_at_the_limit(
    serve: Serve, open_client: Open, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.deployments.experts.connection._MAX_UNSENT_BYTES", 1 << 20)
    server = serve(Wide(), width=4096, family=family)
    sock, other = open_client(server), open_client(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    x = torch.zeros(512, 4096)  # 8 MB a frame
    with contextlib.suppress(OSError):
        for _ in range(10):
            sock.sendall(request_parts(x, [0] * 512, list(range(512))))
    eventually(lambda: server.server.stats.connections == 1, "it is dropped")
    other.sendall(request_parts(x[:1], [0], [0]))
    assert read_frame(other)[0].rows == 1


def test_stop_closes_everything_and_can_be_repeated(serve: Serve, open_client: Open) -> None:
    before = open_files()
    server = serve()
    clients = [open_client(server) for _ in range(5)]
    ask(clients[0])
    assert is_right(clients[0])
    assert server.server.alive
    server.stop()
    assert not server.server.alive
    assert all(is_closed(sock) for sock in clients)
    with pytest.raises(WireError, match="no shard answers"):
        connect(server.address, SECRET, 1)
    server.stop()
    for sock in clients:
        sock.close()
    gc.collect()
    assert open_files() <= before
    listener, _ = listen(server.address)  # free again
    listener.close()


def test_a_server_that_never_started_can_be_stopped() -> None:
    listener, address = listen(Address("tcp", "127.0.0.1", 0))
    server = FrameServer([listener], SECRET, Peer("s", REVISION, WIDTH, "float32"), everything(), LIMITS)
    server.stop()
    assert listener.fileno() == -1
    with pytest.raises(WireError):
        connect(address, SECRET, 1)


class Fatal:
    """What no shard survives."""

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """Raises what isn't an Exception."""
        raise KeyboardInterrupt


def test_a_data_plane_that_ends_by_accident_says_so_and_hangs_up(open_client: Open) -> None:
    """Dispatchers must not wait for a deadline at a socket behind which nobody is."""
    server = RunningServer(Fatal())
    try:
        sock = open_client(server)
        ask(sock)
        assert is_closed(sock)
        eventually(lambda: not server.server.alive, "the thread ends")
        assert isinstance(server.server.failure, KeyboardInterrupt)
        with pytest.raises(WireError, match="no shard answers"):
            connect(server.address, SECRET, 1)
    finally:
        server.stop()


def test_one_server_on_two_listeners_answers_with_the_owners_epoch() -> None:
    pairs = [listen(Address("tcp", "127.0.0.1", 0)), listen(Address("unix", f"test-two-{os.getpid()}"))]
    me = Peer("s", REVISION, WIDTH, "float32")
    server = FrameServer([sock for sock, _ in pairs], SECRET, me, everything(), LIMITS)
    server.start()
    try:
        for epoch, (_, address) in enumerate(pairs, start=3):
            server.epoch = epoch
            sock, peer = connect(address, SECRET, 5)
            with sock:
                sock.settimeout(10)
                assert peer == me
                ask(sock)
                header, body = read_frame(sock)
                assert header.epoch == epoch
                assert len(body) == X.nbytes
    finally:
        server.stop()


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_rows_arrive_whole_in_pieces_of_any_size(serve: Serve, open_client: Open, family: str) -> None:
    server = serve(Wide(), width=4096, family=family)
    sock = open_client(server)
    random = np.random.default_rng(3)
    frames = [torch.from_numpy(random.standard_normal((rows, 4096)).astype(np.float32)) for rows in (1, 300, 2, 70)]
    data = b"".join(request_parts(x, [0] * len(x), list(range(len(x))), frame=frame) for frame, x in enumerate(frames))
    cuts = sorted({0, len(data), 1, HEADER_BYTES, *random.integers(0, len(data), 40).tolist()})
    for begin, end in pairwise(cuts):
        sock.sendall(data[begin:end])
    for frame, x in enumerate(frames):
        header, body = read_frame(sock)
        assert header.frame == frame
        assert torch.equal(parse_combine(header, memoryview(body)), x)
