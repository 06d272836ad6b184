"""What clients of a shard cost that claim, stall, half-close and replay, on the real frame server over real sockets."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from expertmesh.errors import WireError
from expertmesh.routing.transport import Address, TlsSettings, connect
from expertmesh.routing.transport.auth import answer
from expertmesh.routing.wire import HEADER_BYTES, Header, Kind, Limits, parse_combine
from tests.routing.certificates import Authority, write
from tests.routing.harness import (
    EXPERTS,
    LAYERS,
    SECRET,
    WIDTH,
    ReferenceExperts,
    RunningServer,
    TorchKernel,
    eventually,
    read_frame,
    request_parts,
    started_servers,
)

LIMITS = Limits(max_rows=1 << 20, max_bytes=64 << 20, max_pairs_per_row=8)
CLAIM = Header(Kind.DISPATCH, 1, LAYERS[0], 900_000, 500_000, WIDTH, 0, 1)
"""Nearly all that the limits allow."""
LARGEST = Header(Kind.DISPATCH, 1, LAYERS[0], 2**32 - 1, 2**32 - 1, WIDTH, 0, 1)
"""312 GiB."""
X = torch.arange(3 * WIDTH).view(3, WIDTH).float()
QUESTION = request_parts(X, [0, 1, 2], [0, 1, 2])

Serve = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> TlsSettings:
    return write(tmp_path_factory.mktemp("tls"), Authority())


@pytest.fixture
def serve(member: TlsSettings) -> Iterator[Serve]:
    """Starts servers of every expert; stops them after the test and checks that nothing is left. `tls` is a family."""
    with started_servers() as servers:

        def start(family: str = "unix", limits: Limits = LIMITS) -> RunningServer:
            kernel = TorchKernel(ReferenceExperts(), {layer: set(range(EXPERTS)) for layer in LAYERS})
            tls, family = (member, "tcp") if family == "tls" else (None, family)
            servers.append(RunningServer(kernel, family=family, limits=limits, tls=tls))
            return servers[-1]

        yield start


@contextlib.contextmanager
def client(server: RunningServer) -> Iterator[socket.socket]:
    """An authenticated, blocking socket."""
    sock, _ = connect(server.address, SECRET, 20, server.tls)
    with sock:
        sock.settimeout(20)
        yield sock


@contextlib.contextmanager
def stranger(address: Address) -> Iterator[socket.socket]:
    """A blocking socket before the handshake."""
    tcp = address.family == "tcp"
    with socket.socket(socket.AF_INET if tcp else socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect((address.name, address.port) if tcp else f"\0{address.name}")
        yield sock


def is_served(sock: socket.socket) -> bool:
    """Whether a question is answered right."""
    sock.sendall(QUESTION)
    header, body = read_frame(sock)
    want = torch.cat([ReferenceExperts().one(LAYERS[0], e, X[[e]]) for e in range(3)])
    return torch.equal(parse_combine(header, memoryview(body)), want)


def is_closed(sock: socket.socket) -> bool:
    """Whether the server hangs up, now or soon."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


def resident_mib() -> int:
    """Memory that this process really uses."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_claims_cost_what_was_sent_and_not_what_was_claimed(serve: Serve, family: str) -> None:
    """40 clients announce 64 MB each, send a little of it, drop by drop, and never go on."""
    assert 0.94 * LIMITS.max_bytes < CLAIM.body_bytes < LIMITS.max_bytes
    server = serve(family)
    with client(server) as fine, contextlib.ExitStack() as stack:
        assert is_served(fine)
        before = resident_mib()
        slow = [stack.enter_context(client(server)) for _ in range(40)]
        for sock in slow:
            sock.sendall(CLAIM.pack())
        for _ in range(20):
            for sock in slow:
                sock.sendall(b"drop")
            assert is_served(fine)
        assert resident_mib() - before < 64
        stack.close()
        eventually(lambda: server.server.stats.connections == 1, "those that left are forgotten")
        assert is_served(fine)


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_a_claim_that_no_memory_is_left_for_costs_its_client_the_connection(serve: Serve, family: str) -> None:
    server = serve(family, limits=Limits(max_rows=2**32, max_bytes=2**50, max_pairs_per_row=8))
    with client(server) as fine, client(server) as greedy:
        greedy.sendall(LARGEST.pack() + b"drop")
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "1":  # there the memory is promised
            assert is_closed(greedy)
        assert is_served(fine)
        assert server.server.alive


@pytest.mark.parametrize("family", ["unix", "tcp", "tls"])
def test_a_client_that_has_said_its_last_word_gets_its_answer_and_is_forgotten(serve: Serve, family: str) -> None:
    server = serve(family)
    with client(server) as fine, client(server) as half:
        half.sendall(QUESTION + QUESTION[: HEADER_BYTES + 7])
        half.shutdown(socket.SHUT_WR)
        header, _ = read_frame(half)
        assert (header.kind, header.rows) == (Kind.COMBINE, 3)
        assert half.recv(1) == b""
        eventually(lambda: server.server.stats.connections == 1, "the half-closed one is forgotten")
        assert is_served(fine)


@pytest.mark.parametrize("family", ["unix", "tcp", "tls"])
def test_a_client_that_hears_no_more_is_forgotten(serve: Serve, family: str) -> None:
    """It goes on asking, and goes away without reading a single answer."""
    server = serve(family)
    with client(server) as fine:
        with client(server) as deaf:
            deaf.sendall(QUESTION * 200)
            deaf.shutdown(socket.SHUT_RD)
            eventually(lambda: server.server.stats.frames >= 1, "it is served at first")
        eventually(lambda: server.server.stats.connections == 1, "it is forgotten")
        assert is_served(fine)


@pytest.mark.parametrize("family", ["unix", "tcp", "tls"])
def test_half_closed_handshakes_end_at_once(serve: Serve, family: str) -> None:
    """And not after the handshake's timeout, for which 64 of them would keep others out."""
    server = serve(family)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(stranger(server.address))
            sock.sendall(b"half of an answer")
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock)
        eventually(lambda: not server.server.door.waiting, "no handshake is left")
        with client(server) as fine:
            assert is_served(fine)


def recorded(server: RunningServer) -> tuple[bytes, bytes]:
    """(what a client, what the server said) in a whole session through somebody who listens in between."""
    ours, theirs = socket.socketpair()
    with ours, theirs, stranger(server.address) as upstream:
        greeting = upstream.recv(4096)
        theirs.sendall(greeting)
        ours.settimeout(20)
        theirs.settimeout(20)
        said: list[bytes] = []

        class Tapped:
            """The client's socket, whose proof goes on to the server and whose confirmation comes from it."""

            def __getattr__(self, name: str) -> object:
                return getattr(ours, name)

            def sendall(self, data: bytes) -> None:
                said.append(data)
                upstream.sendall(data)
                theirs.sendall(upstream.recv(4096))

        answer(Tapped(), SECRET)  # type: ignore[arg-type]
        upstream.sendall(QUESTION)
        read_frame(upstream)
        return b"".join(said) + QUESTION, greeting


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_replayed_session_is_refused_and_computes_nothing(serve: Serve, family: str) -> None:
    server = serve(family)
    session, greeting = recorded(server)
    assert server.server.stats.frames == 1
    eventually(lambda: server.server.stats.connections == 0, "the recorded client is gone")
    for _ in range(20):
        with stranger(server.address) as sock:
            assert sock.recv(4096) != greeting, "the same challenge twice"
            with contextlib.suppress(ConnectionError):
                sock.sendall(session)
            assert is_closed(sock)
    stats = server.server.stats
    assert (stats.frames, stats.refused, stats.connections) == (1, 0, 0)
    with client(server) as fine:
        assert is_served(fine)


def test_a_replayed_shard_is_refused_by_the_client(serve: Serve) -> None:
    """Its greeting is real; that it can't prove the secret for a fresh nonce shows."""
    _, greeting = recorded(serve())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        theirs.sendall(greeting + os.urandom(32))
        with pytest.raises(WireError, match="does not know the cluster secret"):
            answer(ours, SECRET)


@pytest.mark.parametrize("family", ["unix", "tls"])
def test_connections_that_come_and_go_leave_nothing(serve: Serve, family: str) -> None:
    server = serve(family)
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (names are enough)
    for at in range(300):
        with client(server) as sock:
            sock.sendall(QUESTION[: 40 + at] if at % 2 else b"garbage" * 20)
    eventually(lambda: server.server.stats.connections == 0, "all are forgotten")
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= files, "their descriptors are closed")  # noqa: PTH208
    with client(server) as sock:
        assert is_served(sock)
