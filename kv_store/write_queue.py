"""What waits to be written: bounded, and full means dropped."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class WriteQueue(Generic[T]):
    """Jobs in order, as long as those that wait and those under way have at most `max_bytes` together.

    Never blocks the one who offers. Safe for concurrent use.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._jobs: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def pending_bytes(self) -> int:
        """Bytes of the jobs that wait or are under way."""
        return self._bytes

    def offer(self, job: T, nbytes: int) -> bool:
        """Whether the job was taken; if not it is dropped, and the caller keeps it."""
        with self._changed:
            if self._closed or self._bytes + nbytes > self._max_bytes:
                return False
            self._jobs.append((job, nbytes))
            self._bytes += nbytes
            self._changed.notify()
            return True

    def take(self) -> tuple[T, int] | None:
        """The next job and its size, for whoever calls `release` after it. Waits; None once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return self._jobs.popleft() if self._jobs else None

    def release(self, nbytes: int) -> None:
        """A job of that size is done."""
        with self._changed:
            self._bytes -= nbytes

    def close(self) -> list[T]:
        """Takes no job any more. Returns those that were still waiting, which nobody will take."""
        with self._changed:
            self._closed = True
            left = [job for job, _ in self._jobs]
            self._bytes -= sum(nbytes for _, nbytes in self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
            return left
