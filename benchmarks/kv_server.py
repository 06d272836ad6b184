"""A Valkey that a benchmark may hang, kill, slow down and damage."""

from __future__ import annotations

import contextlib
import secrets
import selectors
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from expertmesh.kv_store import Endpoint, StoreSettings
from expertmesh.kv_store.embedded import server_binary
from expertmesh.kv_store.keys import KEY_PREFIX

_MEMORY = "4gb"
_CHUNK_BYTES = 64 << 10


class BenchServer:
    """Listens on a unix socket in `folder`. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "valkey"
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> StoreSettings:
        """How it is reached."""
        return StoreSettings(Endpoint(path=str(self._path)), password=self._password)

    def settings_by(self, proxy: SlowProxy) -> StoreSettings:
        """How it is reached by way of a proxy."""
        return StoreSettings(Endpoint(path=str(proxy.path)), password=self._password)

    def start(self) -> None:
        """It answers when this returns."""
        lines = {
            "port": "0",
            "unixsocket": str(self._path),
            "requirepass": self._password,
            "maxmemory": _MEMORY,
            "maxmemory-policy": "allkeys-lru",
            "save": '""',
        }
        self._process = subprocess.Popen([server_binary(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{name} {value}\n" for name, value in lines.items()).encode())
        self._process.stdin.close()
        while True:
            with contextlib.suppress(redis.ConnectionError), self.client() as client:
                client.ping()
                return
            if self._process.poll() is not None:
                raise RuntimeError("Valkey does not start")
            time.sleep(0.01)

    def client(self) -> redis.Redis:
        """A connection of redis-py."""
        return redis.Redis(unix_socket_path=str(self._path), password=self._password, protocol=2)

    def blocks(self) -> int:
        """How many there are."""
        with self.client() as client:
            return int(client.dbsize())

    def damage(self, every: int) -> int:
        """Changes four bytes of each `every`th value. Returns how many values that were."""
        with self.client() as client:
            keys = sorted(client.scan_iter(match=KEY_PREFIX + b"*", count=512))[::every]
            for key in keys:
                client.setrange(key, 4096, secrets.token_bytes(4))
        return len(keys)

    def pause(self) -> None:
        """It hangs."""
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone, with all that it held."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process


class SlowProxy:
    """Passes connections on to a unix socket, with `bytes_per_s` for all answers together; None is no limit.

    Use as a context manager.
    """

    def __init__(self, path: Path, target: StoreSettings) -> None:
        self.path = path
        self.bytes_per_s: float | None = None
        self._target = target.endpoint.path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._pace = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.path.unlink()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()

    def _serve(self, theirs: socket.socket) -> None:
        with (
            theirs,
            socket.socket(socket.AF_UNIX) as ours,
            selectors.DefaultSelector() as ready,
            contextlib.suppress(OSError),
        ):
            ours.connect(self._target)
            ready.register(theirs, selectors.EVENT_READ, (ours, False))
            ready.register(ours, selectors.EVENT_READ, (theirs, True))
            while True:
                for key, _ in ready.select():
                    target, answer = key.data
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    data = source.recv(_CHUNK_BYTES)
                    if not data:
                        return
                    if answer and self.bytes_per_s is not None:
                        with self._pace:
                            time.sleep(len(data) / self.bytes_per_s)
                    target.sendall(data)
