"""What is fuzzed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar


class Target(ABC):
    """Something that takes bytes from strangers, and what is right for it to do."""

    name: ClassVar[str]

    def __init__(self, scratch: Path) -> None:
        """scratch: a folder of its own."""
        self.scratch = scratch

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Inputs to begin with, right ones among them."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Raises if what the input does is wrong."""
