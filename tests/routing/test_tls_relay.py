"""The relay between TLS and plain sockets: pressure, half-closes, last words, and its own end."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from expertmesh.routing.transport import Address, Tls, connect, relay
from expertmesh.routing.transport.auth import receive_exactly
from tests.routing.certificates import Authority, write
from tests.routing.harness import eventually
from tests.routing.middle import Middle, middle
from tests.routing.test_tls import SECRET, Shard, shard

Pair = tuple[socket.socket, socket.socket, Middle]
BULK = bytes(range(256)) * (4 << 12)
"""16 MiB: more than relays, socket pairs and TCP hold."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(write(tmp_path_factory.mktemp("tls"), Authority()))


def opened(server: Shard, through: Middle, tls: Tls) -> tuple[socket.socket, socket.socket]:
    """Both plain ends of a connection, the client's first, blocking."""
    known = len(server.members)
    client, _ = connect(through.address, SECRET, 20, tls)
    eventually(lambda: len(server.members) > known, "it is admitted")
    for sock in (client, server.members[-1]):
        sock.settimeout(60)
    return client, server.members[-1]


@pytest.fixture
def pair(tls: Tls) -> Iterator[Pair]:
    """(client's end, server's end, who is between their relays)."""
    with shard(tls) as server, middle(server.address) as between:
        client, member = opened(server, between, tls)
        with client:
            yield client, member, between


def pipes() -> int:
    """Ends of connections that this process relays."""
    running = relay._relay
    return 0 if running is None else len(running._pipes)


def in_background(action: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(OSError):
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_bulk_arrives_whole_in_both_directions_at_once(pair: Pair) -> None:
    client, member, _ = pair
    threads = [in_background(lambda: client.sendall(BULK)), in_background(lambda: member.sendall(BULK[::-1]))]
    assert receive_exactly(member, len(BULK)) == BULK
    assert receive_exactly(client, len(BULK)) == BULK[::-1]
    for thread in threads:
        thread.join()


def test_who_is_not_read_from_is_held_up_and_takes_no_more_memory(pair: Pair) -> None:
    client, member, _ = pair
    client.settimeout(1)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < 1 << 30:
            sent += client.send(BULK[sent % len(BULK) :])
    assert sent < 64 << 20, "what sockets hold"
    assert receive_exactly(member, sent) == (BULK * (sent // len(BULK) + 1))[:sent], "and none of it is lost"


def test_a_half_close_goes_through_and_the_answer_comes_back(pair: Pair) -> None:
    client, member, _ = pair
    sending = in_background(lambda: (client.sendall(BULK), client.shutdown(socket.SHUT_WR)))
    assert receive_exactly(member, len(BULK)) == BULK
    assert member.recv(1) == b""
    sending.join()
    answering = in_background(lambda: (member.sendall(BULK), member.close()))
    assert receive_exactly(client, len(BULK)) == BULK
    assert client.recv(1) == b""
    answering.join()
    client.close()
    eventually(lambda: pipes() == 0, "both ends are gone")


def test_both_sides_end_what_they_say_while_it_is_still_on_its_way(pair: Pair) -> None:
    client, member, _ = pair
    threads = [
        in_background(lambda sock=sock: (sock.sendall(BULK), sock.shutdown(socket.SHUT_WR)))
        for sock in (client, member)
    ]
    for sock in (member, client):
        assert receive_exactly(sock, len(BULK)) == BULK
        assert sock.recv(1) == b""
    for thread in threads:
        thread.join()
    eventually(lambda: pipes() == 0, "both ends are gone")


def test_what_was_said_before_the_end_is_delivered(pair: Pair) -> None:
    client, member, _ = pair
    client.sendall(b"the last words")
    client.close()
    assert receive_exactly(member, 14) == b"the last words"
    assert member.recv(1) == b""


def test_last_words_that_nobody_takes_are_given_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_LINGER_S", 0.2)
    client, member, between = pair
    between.hold()
    member.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        member.sendall(BULK)
    assert pipes() == 2
    member.close()
    eventually(lambda: pipes() == 1, "the shard's end is given up; the client's knows nothing of it yet")
    between.let_go()
    with contextlib.suppress(ConnectionError):
        while client.recv(1 << 20):
            pass
    eventually(lambda: pipes() == 0, "the client's end, too")


def test_a_connection_cut_on_the_network_is_cut_inside(pair: Pair) -> None:
    client, member, between = pair
    between.cut()
    assert client.recv(1) == b""
    assert member.recv(1) == b""
    eventually(lambda: pipes() == 0, "both ends are gone")


def test_a_relay_that_fails_breaks_its_connections_and_the_next_ones_work(
    tls: Tls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody must wait at a socket behind which nobody is."""
    with shard(tls) as server, middle(server.address) as between:
        client, member = opened(server, between, tls)

        def fail(*_: object) -> None:
            raise RuntimeError("a fault of the relay's own")

        with monkeypatch.context() as patched, client:
            patched.setattr(relay._Relay, "_give_up", fail)
            patched.setattr(relay._Relay, "_do", fail)
            client.sendall(b"?")
            assert member.recv(1) == b""
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
            eventually(lambda: "the TLS relay ended" in caplog.text, "it is said")
        client, member = opened(server, between, tls)
        with client:
            client.sendall(b"again")
            assert receive_exactly(member, 5) == b"again"


def test_a_forked_process_relays_on_its_own(pair: Pair, tls: Tls) -> None:
    """Of its parent's relay it has neither the thread nor, for sure, the lock."""
    with shard(tls) as server:
        child = mp.get_context("fork").Process(target=ask_and_check, args=(server.address, tls))
        child.start()
        eventually(lambda: bool(server.members), "it is admitted", 60)
        server.members[0].settimeout(60)
        assert receive_exactly(server.members[0], 9) == b"a request"
        server.members[0].sendall(b"an answer")
        child.join(60)
        assert child.exitcode == 0
    client, member, _ = pair
    client.sendall(b"the parent's")
    assert receive_exactly(member, 12) == b"the parent's"


def ask_and_check(address: Address, tls: Tls) -> None:
    """In a process of its own."""
    sock, _ = connect(address, SECRET, 20, tls)
    sock.settimeout(60)
    sock.sendall(b"a request")
    assert receive_exactly(sock, 9) == b"an answer"
