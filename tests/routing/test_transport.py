"""Sockets and the handshake, over real connections."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import WireError
from expertmesh.routing.transport import Address, Peer, answer, challenge, connect, listen
from expertmesh.routing.transport.auth import receive_exactly
from expertmesh.routing.transport.sockets import accepted

SECRET = b"one secret"
ME = Peer("shard-7", "rev-1", 2048, "bfloat16")


def fresh_address(family: str) -> Address:
    return Address("tcp", "127.0.0.1", 0) if family == "tcp" else Address("unix", f"test-{uuid.uuid4().hex}")


class Side:
    """One side of a handshake in a thread, with what came of it."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.result: object = None
        self.error: Exception | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._act()
        except Exception as error:
            self.error = error

    def join(self) -> Side:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self


@contextlib.contextmanager
def serving(family: str, serve: Callable[[socket.socket], object]) -> Iterator[tuple[Address, Side]]:
    """A listener that hands its first connection to `serve`."""
    listener, address = listen(fresh_address(family))

    def run() -> object:
        with accepted(listener) as sock:
            sock.settimeout(5)
            return serve(sock)

    side = Side(run)
    try:
        yield address, side
    finally:
        side.join()
        listener.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets with a timeout of 5 s."""
    left, right = socket.socketpair()
    with left, right:
        left.settimeout(5)
        right.settimeout(5)
        yield left, right


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_the_same_secret_connects_and_introduces(family: str) -> None:
    def serve(sock: socket.socket) -> bytes:
        challenge(sock, SECRET, ME)
        return receive_exactly(sock, 4)

    with serving(family, serve) as (address, side):
        sock, peer = connect(address, SECRET, 5)
        with sock:
            assert peer == ME
            assert not sock.getblocking()
            assert sock.send(b"ping") == 4
            assert side.join().result == b"ping"


def test_both_ends_of_a_tcp_connection_notice_a_node_that_went_dark() -> None:
    ends: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        challenge(sock, SECRET, ME)
        ends.append(sock.dup())

    with serving("tcp", serve) as (address, side):
        ends.append(connect(address, SECRET, 5)[0])
        side.join()
        for sock in ends:
            with sock:
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle, interval, probes = (
                    sock.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert idle + interval * probes == 30
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_another_secret_is_refused_on_both_sides(family: str) -> None:
    with serving(family, lambda sock: challenge(sock, SECRET, ME)) as (address, side):
        with pytest.raises(WireError, match="secrets differ"):
            connect(address, b"another secret", 5)
        with pytest.raises(WireError, match="does not know the cluster secret"):
            raise side.join().error or AssertionError("the server was satisfied")


def mac(role: bytes, *parts: bytes, secret: bytes = SECRET) -> bytes:
    return hmac.new(secret, role + b"".join(parts), hashlib.sha256).digest()


def greeting(introduction: bytes, nonce: bytes = bytes(32)) -> bytes:
    return b"XMA1" + nonce + struct.pack("<H", len(introduction)) + introduction


def test_a_server_without_the_secret_is_refused_by_the_client(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    introduction = json.dumps(asdict(ME)).encode()
    side = Side(lambda: answer(client, SECRET))
    server.sendall(greeting(introduction))
    reply = receive_exactly(server, 64)
    server.sendall(mac(b"server", reply[:32], bytes(32), introduction, secret=b"a guess"))
    with pytest.raises(WireError, match="shard does not know the cluster secret"):
        raise side.join().error or AssertionError


def test_the_clients_own_proof_sent_back_is_no_proof(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    side = Side(lambda: answer(client, SECRET))
    server.sendall(greeting(b"{}"))
    server.sendall(receive_exactly(server, 64)[32:])
    with pytest.raises(WireError, match="shard does not know the cluster secret"):
        raise side.join().error or AssertionError


def test_an_introduction_changed_on_the_way_is_refused_on_both_sides() -> None:
    """A man in the middle swaps the shard's id for one of the same length and passes the rest on."""
    (client, towards_client), (towards_server, server) = socket.socketpair(), socket.socketpair()
    with client, towards_client, towards_server, server:
        for sock in (client, towards_client, towards_server, server):
            sock.settimeout(5)
        shard = Side(lambda: challenge(server, SECRET, ME))
        asking = Side(lambda: answer(client, SECRET))
        hello = towards_server.recv(4096)
        assert b"shard-7" in hello
        towards_client.sendall(hello.replace(b"shard-7", b"shard-8"))
        towards_server.sendall(receive_exactly(towards_client, 64))
        with pytest.raises(WireError, match="client does not know the cluster secret"):
            raise shard.join().error or AssertionError
        towards_client.close()
        with pytest.raises(WireError, match="refused the handshake"):
            raise asking.join().error or AssertionError


def test_a_recorded_answer_does_not_open_a_second_connection() -> None:
    recorded = b""
    with serving("unix", lambda sock: challenge(sock, SECRET, ME)) as (address, side):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect("\0" + address.name)
            hello = sock.recv(4096)
            nonce, introduction = hello[4:36], hello[38:]
            recorded = bytes(32) + mac(b"client", nonce, bytes(32), introduction)
            sock.sendall(recorded)
            assert receive_exactly(sock, 32) == mac(b"server", bytes(32), nonce, introduction)
        assert side.join().error is None  # genuine the first time

    with serving("unix", lambda sock: challenge(sock, SECRET, ME)) as (address, side):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect("\0" + address.name)
            sock.recv(4096)
            sock.sendall(recorded)
            assert sock.recv(4096) == b""
        assert isinstance(side.join().error, WireError)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "not an expert shard"),
        (b"XMA1" + bytes(32) + b"\xff\xff", "introduction of 65535 bytes; at most 4096"),
        (b"XMA1" + bytes(10), "peer closed the connection after 14 of 38 bytes"),
        (b"", "after 0 of 38 bytes"),
        (greeting(b"{}")[:-1], "after 1 of 2 bytes"),
    ],
)
def test_a_server_that_is_no_shard_is_refused(said: bytes, match: str) -> None:
    with (
        serving("tcp", lambda sock: sock.sendall(said)) as (address, _),
        pytest.raises(WireError, match=match),
    ):
        connect(address, SECRET, 5)


@pytest.mark.parametrize("introduction", [b"{}", b"[]", b"not json", b'{"shard": "a"}', b'"x"', b"\xff"])
def test_an_introduction_that_is_not_understood_is_refused(introduction: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(greeting(introduction))
        client_nonce = receive_exactly(sock, 64)[:32]
        sock.sendall(mac(b"server", client_nonce, bytes(32), introduction))

    with (
        serving("unix", serve) as (address, _),
        pytest.raises(WireError, match="introduction is not understood"),
    ):
        connect(address, SECRET, 5)


def test_a_silent_server_is_given_up_after_the_timeout() -> None:
    with serving("unix", lambda sock: sock.recv(1)) as (address, _):
        begin = time.monotonic()
        with pytest.raises(WireError, match=f"{address} broke off the handshake: timed out"):
            connect(address, SECRET, 0.2)
        assert 0.15 < time.monotonic() - begin < 3


def test_a_server_that_drips_is_given_up_after_the_timeout() -> None:
    """Bytes that keep coming must not stretch the timeout: a step waits for it."""
    stop = threading.Event()

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for byte in greeting(bytes(4000)):
                sock.sendall(bytes([byte]))
                if stop.wait(0.05):
                    return

    with serving("unix", serve) as (address, _):
        try:
            begin = time.monotonic()
            with pytest.raises(WireError, match="timed out"):
                connect(address, SECRET, 0.3)
            assert time.monotonic() - begin < 1.5  # dripped to its end the greeting takes minutes
        finally:
            stop.set()


@pytest.mark.parametrize("said", [b"", b"x" * 63])
def test_a_client_that_says_too_little_times_out(said: bytes, pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    server.settimeout(0.2)
    client.sendall(said)
    with pytest.raises(TimeoutError):
        challenge(server, SECRET, ME)


def test_a_client_that_says_half_and_goes_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    client.sendall(b"x" * 32)
    client.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match="after 32 of 64 bytes"):
        challenge(server, SECRET, ME)


def test_a_client_that_says_garbage_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    client.sendall(b"GET / HTTP/1.1\r\nHost: shard\r\nUser-Agent: a browser that is lost\r\n\r\n")
    with pytest.raises(WireError, match="client does not know the cluster secret"):
        challenge(server, SECRET, ME)


@pytest.mark.parametrize("address", ["unix:@test-nobody-listens-here", "tcp:127.0.0.1:1", "tcp:no..such..host:80"])
def test_an_address_where_nobody_listens(address: str) -> None:
    with pytest.raises(WireError, match="no shard answers at"):
        connect(Address.parse(address), SECRET, 1)


def test_an_address_that_is_taken_is_an_oserror() -> None:
    listener, address = listen(fresh_address("unix"))
    with listener, pytest.raises(OSError, match="in use"):
        listen(address)


@given(name=st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=40))
def test_a_unix_address_reads_back(name: str) -> None:
    address = Address("unix", name)
    assert Address.parse(str(address)) == address


@given(
    host=st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)),
    port=st.integers(0, 65535),
)
def test_a_tcp_address_reads_back(host: str, port: int) -> None:
    address = Address("tcp", host, port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "unix", "unix:", "unix:name", "unix:@", "tcp:", "tcp:host", "tcp:host:", "tcp::80", "tcp:host:x",
        "tcp:host:-1", "tcp:host:65536", "tcp:host:" + "9" * 5000, "udp:host:1", "@x", "tcp:host:1 ",
    ],
)  # fmt: skip
def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(WireError, match="allowed: unix:@NAME or tcp:HOST:PORT"):
        Address.parse(text)


@given(text=st.text(max_size=30))
def test_random_text_raises_nothing_but_wire_errors(text: str) -> None:
    for candidate in (text, "tcp:" + text, "unix:@" + text):
        with contextlib.suppress(WireError):
            Address.parse(candidate)
