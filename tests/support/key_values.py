"""A key-value store in memory, in the place of Ray's."""

from __future__ import annotations

import threading


class Memory:
    """A store in this process with the promises of Ray's; the real one is driven by tests/mesh."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """As KeyValues."""
        return self._values.get(key)

    def put(self, key: str, value: bytes) -> None:
        """As KeyValues."""
        self._values[key] = value

    def claim(self, key: str) -> bool:
        """As KeyValues."""
        with self._lock:
            fresh = key not in self._values
            self._values.setdefault(key, b"")
            return fresh

    def keys(self, prefix: str) -> list[str]:
        """As KeyValues."""
        with self._lock:
            return [key for key in self._values if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        """As KeyValues."""
        self._values.pop(key, None)
