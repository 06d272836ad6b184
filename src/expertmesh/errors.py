"""The one tree of exceptions.

Each carries a message that a user can act on: which field, file or tensor, what was wrong, what is allowed.
"""

from __future__ import annotations


class ExpertMeshError(Exception):
    """Base of every error that ExpertMesh raises on purpose."""


class ConfigError(ExpertMeshError):
    """A configuration, argument or environment value that can't be used."""


class CheckpointError(ExpertMeshError):
    """A checkpoint that is missing, broken, or not of the model that its config names."""


class WireError(ExpertMeshError):
    """A peer on the data plane that broke the protocol, failed to authenticate, or went away."""


class Unavailable(ExpertMeshError):
    """Something that may be there again soon. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Unavailable], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)
