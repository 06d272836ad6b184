"""What the store did, in a file that the engine's owner reads: the engine's process answers no questions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PERIOD_S = 0.5


class Reporter:
    """Writes what `read` returns as JSON, twice a second where it changed, from a thread of its own."""

    def __init__(self, path: Path, read: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._read = read
        self._last: dict[str, Any] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-store-report", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes a last time."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(_PERIOD_S)
            now = self._read()
            if now != self._last:
                draft = self._path.with_suffix(".new")
                try:
                    draft.write_text(json.dumps(now))
                    draft.replace(self._path)
                except OSError:  # the folder is gone: its owner ended, and we are about to
                    return
                self._last = now
