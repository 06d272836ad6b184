"""Parts of one remote file that this machine already has.

Two files: a sparse one with the remote file's size, in which parts lie where they lie in the original, and a journal
with one record for each part: offset, length, digest of the data, digest of the record. A part is written before its
record, so a process may be killed at any time, and what it had fetched is found by the next. Processes share both
without a lock: the remote content is fixed, so two that write the same part write the same bytes, and records are
appended by one `write` each. Every part is compared with its digest when it is read; one that differs is a miss.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
from pathlib import Path

from blake3 import blake3

log = logging.getLogger("expertmesh.weights")

_FIELDS = struct.Struct("<QQ16s")
_RECORD_BYTES = _FIELDS.size + 8


class PartCache:
    """The parts of one file of `size` bytes at `path`. Safe to share between threads and processes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._journal = path.with_name(f"{path.name}.parts")
        self._lock = threading.Lock()
        self._digests: dict[tuple[int, int], bytes] | None = None
        self._writable = True

    def read_into(self, offset: int, target: memoryview) -> bool:
        """Fill `target` if just this part is here and sound; else False, and `target` may hold anything."""
        part = (offset, len(target))
        with self._lock:
            digest = self._known().get(part)
        if digest is None:
            return False
        if self._read(offset, target) and _digest(target) == digest:
            return True
        log.warning("%s: bytes %d-%d are damaged; they are fetched again", self.path, offset, offset + len(target) - 1)
        with self._lock:
            self._known().pop(part, None)
        return False

    def add(self, offset: int, data: memoryview) -> None:
        """Keep a part. Without room or leave to write nothing is kept from then on, and the log says so once."""
        if not self._writable:
            return
        digest = _digest(data)
        fields = _FIELDS.pack(offset, len(data), digest)
        try:
            self._write(offset, data)
            self._append(fields + _digest(fields)[:8])
        except OSError as error:
            self._writable = False
            log.warning("%s: parts are not kept any more (%s)", self.path, error.strerror)
            return
        with self._lock:
            self._known()[offset, len(data)] = digest

    def _known(self) -> dict[tuple[int, int], bytes]:
        if self._digests is None:
            self._digests = {}
            raw = self._journal.read_bytes() if self._journal.exists() else b""
            start = 0
            while start + _RECORD_BYTES <= len(raw):
                fields, check = raw[start : start + _FIELDS.size], raw[start + _FIELDS.size : start + _RECORD_BYTES]
                if _digest(fields)[:8] != check:
                    start += 1  # a torn record: the next whole one begins anywhere
                    continue
                offset, length, digest = _FIELDS.unpack(fields)
                self._digests[offset, length] = digest
                start += _RECORD_BYTES
        return self._digests

    def _read(self, offset: int, target: memoryview) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            done = 0
            while done < len(target) and (count := os.preadv(descriptor, [target[done:]], offset + done)):
                done += count
            return done == len(target)
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def _write(self, offset: int, data: memoryview) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size != self._size:
                os.ftruncate(descriptor, self._size)
            done = 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        finally:
            os.close(descriptor)

    def _append(self, record: bytes) -> None:
        descriptor = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, record)
        finally:
            os.close(descriptor)


def _digest(data: bytes | memoryview) -> bytes:
    return blake3(data).digest(length=16)
