"""GB/s of our client against redis-py and against a socket with nothing but the bytes that must pass."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable

from benchmarks.kv_server import BenchServer
from expertmesh.kv_store import StoreClient

_SIZES = {"256k": 256 << 10, "1m": 1 << 20}
_BATCH_BYTES = 8 << 20
_TIMEOUT_S = 60.0


class _Raw:
    """Sends prepared commands and receives the answers' bytes without looking at them."""

    def __init__(self, server: BenchServer, keys: list[bytes], value: bytes) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        self._sock.connect(server.settings.endpoint.path)
        self._value = value
        self._heads = [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value)) for key in keys]
        self._gets = b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys)
        self._got = memoryview(bytearray(len(keys) * len(b"$%d\r\n%b\r\n" % (len(value), value))))
        password = server.settings.password.encode()
        self._sock.sendall(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%b\r\n" % (len(password), password))
        self._receive(5)

    def set(self) -> None:
        for head in self._heads:
            self._sock.sendall(head)
            self._sock.sendall(self._value)
            self._sock.sendall(b"\r\n")
        self._receive(5 * len(self._heads))

    def get(self) -> None:
        self._sock.sendall(self._gets)
        self._receive(len(self._got))

    def close(self) -> None:
        self._sock.close()

    def _receive(self, size: int) -> None:
        at = 0
        while at < size:
            at += self._sock.recv_into(self._got[at:size])


def measure(server: BenchServer, rounds: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(our GB/s / the raw socket's by size, the worse of GET and SET; GB/s by size and what did it).

    One connection each, batches of 8 MiB, the three in turn in each round; medians of the rounds.
    """
    ratios, rates = {}, {}
    for name, size in _SIZES.items():
        rates[name] = _one_size(server, size, rounds)
        ratios[name] = min(rates[name][f"ours_{verb}"] / rates[name][f"raw_{verb}"] for verb in ("get", "set"))
    return ratios, rates


def _one_size(server: BenchServer, size: int, rounds: int) -> dict[str, float]:
    value = os.urandom(size)
    keys = [b"bench:%d" % i for i in range(_BATCH_BYTES // size)]
    memory = [memoryview(bytearray(size)) for _ in keys]
    raw, ours, theirs = _Raw(server, keys, value), StoreClient(server.settings), server.client()

    def ours_set() -> None:
        replies = ours.set([(key, (memoryview(value),)) for key in keys], 600, _TIMEOUT_S)
        assert replies == [size] * len(keys), replies

    def ours_get() -> None:
        replies = ours.get([(key, (part,)) for key, part in zip(keys, memory, strict=True)], _TIMEOUT_S)
        assert replies == [size] * len(keys), replies

    def theirs_set() -> None:
        with theirs.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.set(key, value, ex=600)
            pipeline.execute()

    def theirs_get() -> None:
        with theirs.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.get(key)
            pipeline.execute()

    work: dict[str, Callable[[], None]] = {
        "raw_set": raw.set,
        "ours_set": ours_set,
        "redis_py_set": theirs_set,
        "raw_get": raw.get,
        "ours_get": ours_get,
        "redis_py_get": theirs_get,
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, action in work.items():
            begin = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - begin)
    theirs.delete(*keys)
    for client in (raw, ours, theirs):
        client.close()
    return {name: _BATCH_BYTES / statistics.median(took[1:]) / 1e9 for name, took in seconds.items()}
