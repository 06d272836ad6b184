"""The interface through which checkpoints are read, and its plain form: files on a disk, local or shared."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path

from expertmesh.errors import CheckpointError

PART_BYTES = 16 << 20
"""Longest stretch that is read at once; longer ones are cut, so that several connections or disks share them."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file; the format's own limit."""


class Files(ABC):
    """The files of one checkpoint. Safe to share between threads."""

    folder: Path
    """Where config.json, tokenizer and index are, on this machine."""
    parallel: int
    """Reads at once that pay."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of all files. CheckpointError if they can't be listed."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. CheckpointError if it can't be read or is no regular file."""

    @abstractmethod
    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target`, writable bytes that the caller owns, with the file's bytes from `offset` on.

        CheckpointError, naming file and range, if the file can't be read, is shorter, or is not what it was.
        """

    @abstractmethod
    def identity(self, name: str) -> str | None:
        """What identifies the file's content where its store knows such a thing, else None."""

    @property
    @abstractmethod
    def bytes_fetched(self) -> int:
        """Bytes that came over the network so far, retries included; 0 where there is none."""


class LocalFiles(Files):
    """The files of a folder. Several reads at once also pay on a shared file system such as FSx for Lustre."""

    parallel = 4
    bytes_fetched = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> frozenset[str]:
        try:
            return frozenset(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise CheckpointError(f"{self.folder}: can't be read as a folder ({error.strerror})") from error

    def size(self, name: str) -> int:
        path = self.folder / name
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        return status.st_size

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error
        try:
            done = 0
            while done < len(target):
                # May return less than asked for: 2 GiB at most on Linux.
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset + done}; it was longer when it was opened")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read at {offset + done} ({error.strerror})") from error
        finally:
            os.close(descriptor)

    def identity(self, name: str) -> str | None:
        return None
