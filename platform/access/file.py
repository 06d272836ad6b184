"""The file of API keys: read by ingress replicas while they serve, written by `expertmesh keys`.

It holds digests, so reading it gives no access; writing to it does, and a file that others may write to is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from expertmesh.errors import ConfigError
from expertmesh.platform.access.records import KeyRing

log = logging.getLogger("expertmesh.access")

MAX_FILE_BYTES = 8 << 20

_Version = tuple[int, int, int, int, int]


class KeyFile:
    """The keys in a file as they are now. For one thread."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file can't be read, is no key file, or others may write to it."""
        self._path = path
        self._keys: KeyRing
        self._version: _Version | None
        self._keys, self._version = _read(path)

    def current(self) -> KeyRing:
        """The keys. Costs one `stat`, and reads the file again if it has changed.

        A file that has become unreadable or wrong leaves the keys as they were, and says so in the log, once.
        """
        try:
            version = _version_of(self._path.stat())
        except OSError:  # read below, which says why it can't be
            version = None
        if version != self._version:
            self._version = version
            try:
                self._keys, self._version = _read(self._path)
                log.warning("API keys read again from %s: %d keys", self._path, len(self._keys))
            except ConfigError as error:
                log.error("API keys stay as they were: %s", error)
        return self._keys


def read_keys(path: Path) -> KeyRing:
    """The keys in `path`. Raises ConfigError as `KeyFile` does."""
    return _read(path)[0]


def change_keys(path: Path, change: Callable[[KeyRing], KeyRing], create: bool = False) -> None:
    """Replaces the file by one with changed keys, in one step: readers see the old or the new, also after a crash.

    Owner and mode stay; a new file (only with `create`) is closed to others. Changes by several processes at once are
    made one after the other. Raises ConfigError, and leaves the file alone, where reading, `change` or writing fails.
    """
    try:
        with _locked(path.parent):
            before = path.stat() if path.exists() else None
            keys = KeyRing() if before is None and create else read_keys(path)
            _replace(path, change(keys).dump(), before)
    except OSError as error:
        raise ConfigError(f"API keys: can't write {path}: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of ours out of the folder; the lock goes with the process and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str, before: os.stat_result | None) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".keys-")  # 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            if before is not None:
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(draft).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(draft).unlink()
        raise


def _read(path: Path) -> tuple[KeyRing, _Version]:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer before we can see that it is one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"API keys: can't read {path}: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"API keys: {path} is not a regular file")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"API keys: others may write to {path} (mode {mode:04o}); mend: chmod go-w {path}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"API keys: {path} is larger than {MAX_FILE_BYTES} bytes; is it a key file?")
    try:
        return KeyRing.parse(raw), _version_of(status)
    except ConfigError as error:
        raise ConfigError(f"API keys: {path}: {error}") from None


def _version_of(status: os.stat_result) -> _Version:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
