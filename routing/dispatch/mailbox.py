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
EVENTS = ("dispatches", "retries", "waits", "refused", "broken", "overdue")
"""`retries`: a step sent pairs again; `waits`: it looked for a newer table; then frames without an answer, by why."""
PARTS = (
    "frames",
    "bytes_sent",
    "bytes_received",
    "route_ns",
    "exchange_ns",
    "queue_ns",
    "compute_ns",
    "combine_ns",
)
"""What `native.add_parts` adds to, in its order. `queue_ns` and `compute_ns` lie within `exchange_ns`."""


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
    """Counts so far, all int64: `tokens` [layers, experts], `events` and `parts` in the order of EVENTS and PARTS.

    One process adds, others read; a reader may see a step half counted, never a torn number.
    """

    def __init__(self, path: Path, layers: int, experts: int) -> None:
        """Maps the file, creating it (zeros) if it isn't there. Raises OSError if it can't."""
        size = (layers * experts + len(EVENTS) + len(PARTS)) * 8
        with path.open("ab") as file:
            if file.tell() < size:
                file.truncate(size)
        mapped = np.memmap(path, dtype=np.int64, mode="r+", shape=(size // 8,))
        flat: np.ndarray[Any, np.dtype[np.int64]] = np.asarray(mapped)  # a plain array: half the cost of each addition
        self.events, self.parts, tokens = np.split(flat, [len(EVENTS), len(EVENTS) + len(PARTS)])
        self.tokens = tokens.reshape(layers, experts)

    def as_dict(self) -> dict[str, int]:
        """Events and parts by name."""
        return dict(zip(EVENTS + PARTS, [*self.events.tolist(), *self.parts.tolist()], strict=True))


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

    @property
    def samples_path(self) -> Path:
        """The socket that takes samples of dispatches."""
        return self.folder / "samples"

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
