"""What an attention replica and its engine process share: a folder in memory.

The replica writes the routing table there (atomic rename); the engine process reads it when it changed, counts expert
loads into a mapped file, and names the shards that it has trouble with. Neither waits for the other: a replica that is
busy can't stall a step, a step that waits for a missing expert still sees the table that brings it, and a restarted
process finds what the last one left.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from expertmesh.routing.placement import RoutingTable

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "expertmesh-"
_COUNTERS = ("dispatches", "retries", "waits")


def _parent() -> Path:
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


class TableSource(Protocol):
    """Where a dispatcher gets its table."""

    def current(self) -> RoutingTable | None:
        """The newest table; None before there is one. Cheap enough to call for every layer."""


class StaticTable:
    """A table that never changes."""

    def __init__(self, table: RoutingTable) -> None:
        self._table = table

    def current(self) -> RoutingTable | None:
        """The table given at the start."""
        return self._table


class TableFile:
    """A table in a file that another process replaces by rename."""

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._seen: tuple[int, int] | None = None
        self._table: RoutingTable | None = None

    def current(self) -> RoutingTable | None:
        """The table as of the last rename. Raises WireError if the file holds something else."""
        try:
            stat = os.stat(self._path)  # noqa: PTH116 (four times as fast, and once a layer)
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                self._table = RoutingTable.from_json(Path(self._path).read_bytes())
                self._seen = seen
        except FileNotFoundError:  # not there yet, or its replica is about to end
            pass
        return self._table


class LoadCounters:
    """Counts so far: `tokens` [layers, experts] int64 and `events` [3] int64 (`dispatches`, `retries`, `waits`).

    One process adds, others read; a reader may see a step half counted, never a torn number.
    """

    def __init__(self, path: Path, layers: int, experts: int) -> None:
        """Maps the file, creating it (zeros) if it isn't there. Raises OSError if it can't."""
        size = (layers * experts + len(_COUNTERS)) * 8
        with path.open("ab") as file:
            if file.tell() < size:
                file.truncate(size)
        mapped = np.memmap(path, dtype=np.int64, mode="r+", shape=(size // 8,))
        flat: np.ndarray[Any, np.dtype[np.int64]] = np.asarray(mapped)  # a plain array: half the cost of each addition
        self.events = flat[: len(_COUNTERS)]
        self.tokens = flat[len(_COUNTERS) :].reshape(layers, experts)

    def as_dict(self) -> dict[str, int]:
        """The events by name."""
        return dict(zip(_COUNTERS, self.events.tolist(), strict=True))


class Mailbox:
    """The folder, from the replica's side: made private to the user, removed by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls) -> Mailbox:
        """A new empty mailbox of this process, in shared memory (in the temporary folder where there is none)."""
        cls.sweep()
        return cls(Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_parent())))

    @staticmethod
    def sweep() -> None:
        """Removes mailboxes whose process was killed before it could."""
        for folder in _parent().glob(f"{_PREFIX}*-*"):
            pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def table_path(self) -> Path:
        """The routing table."""
        return self.folder / "table.json"

    @property
    def loads_path(self) -> Path:
        """The load counters."""
        return self.folder / "loads"

    def publish(self, table: RoutingTable) -> None:
        """Replaces the table in one step."""
        self._replace(self.table_path, table.to_json())

    def tell_trouble(self, shards: list[str]) -> None:
        """Names the shards that have failed since their last answer."""
        with contextlib.suppress(OSError):  # the replica is about to end
            self._replace(self._trouble_path, json.dumps(shards))

    def trouble(self) -> list[str]:
        """The shards named last."""
        try:
            shards: list[str] = json.loads(self._trouble_path.read_text())
        except FileNotFoundError:
            return []
        return shards

    @property
    def _trouble_path(self) -> Path:
        return self.folder / "trouble.json"

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(text)
        fresh.replace(path)

    def close(self) -> None:
        """Removes the folder; does nothing the second time."""
        shutil.rmtree(self.folder, ignore_errors=True)
