"""The bulk protocol: against a real Valkey, and against any way in which bytes may arrive."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kv_store import StoreClosed, StoreRefused, StoreTimeout
from expertmesh.kv_store.channel import Channel
from tests.kv_store.servers import PATIENCE_S, Server


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


@contextmanager
def connected(path: Path) -> Iterator[Channel]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        yield Channel(sock)


@given(
    values=st.lists(st.lists(st.integers(0, 9000), min_size=1, max_size=3), min_size=1, max_size=20),
    missing=st.sets(st.integers(0, 19)),
)
@settings(deadline=None, max_examples=40)
def test_what_was_set_is_read(shared_socket: Path, values: list[list[int]], missing: set[int]) -> None:
    with connected(shared_socket) as channel:
        written = [(b"%d" % i, [memoryview(os.urandom(size)) for size in sizes]) for i, sizes in enumerate(values)]
        assert channel.set(written, 60, soon()) == [sum(sizes) for sizes in values]
        wanted = [
            (b"absent" if i in missing else key, views(*map(len, parts))) for i, (key, parts) in enumerate(written)
        ]
        replies = channel.get(wanted, soon())
        for i, ((_, parts), (_, buffers), reply) in enumerate(zip(written, wanted, replies, strict=True)):
            if i in missing:
                assert reply is None
            else:
                assert reply == sum(map(len, parts))
                assert buffers == parts
        assert channel.exists([b"0", b"absent"], soon()) == [1, None]


def test_a_batch_that_is_larger_than_the_window(shared_socket: Path) -> None:
    sizes = [3 << 20, 1 << 20, 20 << 20, 1, 256 << 10, 9 << 20]
    written = [(b"big %d" % i, [memoryview(os.urandom(size))]) for i, size in enumerate(sizes)]
    with connected(shared_socket) as channel:
        assert channel.set(written, 60, soon()) == sizes
        wanted = [(key, views(len(parts[0]))) for key, parts in written]
        assert channel.get(wanted, soon()) == sizes
        assert [buffers for _, buffers in wanted] == [parts for _, parts in written]


def test_a_value_of_another_size_is_told_and_the_connection_goes_on(shared_socket: Path) -> None:
    with connected(shared_socket) as channel:
        channel.set([(b"a", [memoryview(b"x" * 5000)]), (b"b", [memoryview(b"y" * 10)])], 60, soon())
        first, second = views(10), views(10)
        assert channel.get([(b"a", first), (b"b", second)], soon()) == [5000, 10]
        assert second[0] == b"y" * 10


def test_every_value_expires(shared_socket: Path) -> None:
    with connected(shared_socket) as channel, socket.socket(socket.AF_UNIX) as raw:
        channel.set([(b"ttl", [memoryview(b"x")])], 60, soon())
        raw.connect(str(shared_socket))
        raw.sendall(b"TTL ttl\r\n")
        assert raw.recv(10) in (b":60\r\n", b":59\r\n")


def test_a_refused_value_is_an_error_of_its_own(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.config["port"]))) as sock:
        channel = Channel(sock)
        (reply,) = channel.set([(b"a", [memoryview(b"x")])], 60, soon())
        assert isinstance(reply, StoreRefused)
        assert reply.code == "NOAUTH"
        with pytest.raises(StoreRefused, match="NOAUTH"):
            channel.ping(soon())


CALLS: dict[str, Callable[[Channel, float], object]] = {
    "get": lambda channel, deadline: channel.get([(b"a", views(10))], deadline),
    "exists": lambda channel, deadline: channel.exists([b"a"], deadline),
    "set": lambda channel, deadline: channel.set([(b"a", views(64 << 20))], 60, deadline),
    "ping": lambda channel, deadline: channel.ping(deadline),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_hangs_is_given_up(server: Server, call: str) -> None:
    with socket.create_connection(("127.0.0.1", int(server.config["port"]))) as sock:
        server.pause()
        with pytest.raises(StoreTimeout) as caught:
            CALLS[call](Channel(sock), time.monotonic() + 0.05)
        assert not caught.value.progress
        server.resume()


@contextmanager
def scripted(chunks: Sequence[bytes]) -> Iterator[Channel]:
    """A peer that takes anything and sends these chunks one by one."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs, suppress(ConnectionError):  # we may leave before having read all
            for chunk in chunks:
                theirs.sendall(chunk)
            while theirs.recv(1 << 16):
                pass

    peer = threading.Thread(target=send)
    peer.start()
    try:
        with ours:
            yield Channel(ours)
    finally:
        peer.join()


@given(cuts=st.lists(st.integers(0, 60), max_size=12))
@settings(deadline=None)
def test_replies_may_come_in_any_pieces(cuts: list[int]) -> None:
    stream = b"$5\r\nab\r\nc\r\n$-1\r\n$3\r\nxyz\r\n-OOM no memory\r\n$0\r\n\r\n"
    edges = [0, *sorted(cut for cut in cuts if cut <= len(stream)), len(stream)]
    with scripted([stream[a:b] for a, b in pairwise(edges)]) as channel:
        wanted = [(b"k", views(5)), (b"k", views(5)), (b"k", views(1, 2)), (b"k", views(4)), (b"k", views(0))]
        replies = channel.get(wanted, soon())
        assert replies[:3] == [5, None, 3]
        assert isinstance(replies[3], StoreRefused)
        assert replies[3].code == "OOM"
        assert replies[4] == 0
        assert b"".join(wanted[0][1]) == b"ab\r\nc"
        assert b"".join(wanted[2][1]) == b"xyz"


@pytest.mark.parametrize(
    "stream",
    [
        b"+OK\r\n",
        b":1\r\n",
        b"$x\r\n",
        b"$-7\r\n",
        b"$2\r\nabcd",
        b"$999999999999\r\n",
        b"x" * 5000,
        b"\n\n\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_what_is_not_an_answer_ends_the_connection(stream: bytes) -> None:
    with scripted([stream]) as channel, pytest.raises(StoreClosed):
        channel.get([(b"k", views(2))], soon())


@pytest.mark.parametrize("stream", [b"", b"$5\r\nab"])
def test_a_server_that_hangs_up(stream: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(stream)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(StoreClosed, match="closed the connection"):
            Channel(ours).get([(b"k", views(5))], soon())
    theirs.close()


def test_a_slow_server_has_made_progress() -> None:
    with scripted([b"$5\r\nab"]) as channel:
        with pytest.raises(StoreTimeout) as caught:
            channel.get([(b"k", views(5))], time.monotonic() + 0.2)
        assert caught.value.progress
