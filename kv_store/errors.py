"""What can go wrong with the store. None of it is ever a request's error: callers turn it into a miss."""

from __future__ import annotations

from expertmesh.errors import Unavailable


class StoreError(Unavailable):
    """The store did not do what it was asked. The message never holds a secret."""


class StoreTimeout(StoreError):
    """A server did not answer in time. `progress`: whether it sent or took anything of the batch at all."""

    def __init__(self, message: str, progress: bool = False) -> None:
        super().__init__(message)
        self.progress = progress

    def __reduce__(self) -> tuple[type[StoreTimeout], tuple[str, bool]]:
        return type(self), (str(self), self.progress)


class StoreClosed(StoreError):
    """A connection that could not be made, or that broke."""


class StoreSkipped(StoreError):
    """The server was not asked, because it failed a moment ago."""


class StoreRefused(StoreError):
    """A server's error reply. `code` is its first word, e.g. `OOM`, `NOPERM`, `MOVED`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]

    def __reduce__(self) -> tuple[type[StoreRefused], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self),)
