"""A whole checkpoint on this machine's disk, for engines that read it by themselves."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expertmesh.errors import CheckpointError
from expertmesh.platform.weights.files import PART_BYTES
from expertmesh.platform.weights.mirror import MirroredFiles, Progress, open_files


def download(folder: Path, progress: Progress | None = None) -> MirroredFiles:
    """Makes the mirror `folder` complete: every *.safetensors file is in it afterwards. Returns what was read through.

    Parts that are here are compared with their digests and not fetched again, so a download that was interrupted goes
    on. A file is put into `folder` when all of it is here and its CRC-32 is the one that S3 keeps (where it keeps one).
    Raises CheckpointError if S3 fails, if a checksum differs, or if the disk is full.
    """
    files = open_files(folder)
    if not isinstance(files, MirroredFiles):
        raise CheckpointError(f"{folder}: is not the mirror of a checkpoint in S3")
    names = [name for name in sorted(files.source.weights) if name.endswith(".safetensors")]
    total, done = sum(files.size(name) for name in names), 0

    def fetch(part: tuple[str, int, int]) -> int:
        name, offset, length = part
        files.keep(name, offset, memoryview(bytearray(length)))
        return length

    with ThreadPoolExecutor(files.parallel) as pool:
        try:
            for length in pool.map(fetch, _parts(files, names)):
                done += length
                if progress is not None:
                    progress(f"fetching {files.source.location.url()}", done / max(1, total))
            list(pool.map(lambda name: _put(files, name), names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return files


def _parts(files: MirroredFiles, names: list[str]) -> Iterator[tuple[str, int, int]]:
    for name in names:
        size = files.size(name)
        for offset in range(0, size, PART_BYTES):
            yield name, offset, min(PART_BYTES, size - offset)


def _put(files: MirroredFiles, name: str) -> None:
    """Links the complete data into the folder."""
    data, link = files.cache(name).path, files.folder / name
    if not data.exists() or data.stat().st_size != files.size(name):
        raise CheckpointError(f"{data}: could not be written; is there room for {files.size(name)} bytes?")
    if link.is_symlink():
        return
    expected = files.reader.crc32(files.source.weights[name])
    if expected is not None and (found := file_crc32(data)) != expected:
        raise CheckpointError(f"{files.source.location.url(name)}: CRC-32 is {found}, S3 keeps {expected}")
    fresh = link.with_name(f".{name}.{os.getpid()}")
    fresh.symlink_to(os.path.relpath(data, link.parent))
    fresh.replace(link)


def file_crc32(path: Path) -> str:
    """The CRC-32 of a file as S3 writes it: base64 of 4 bytes, big-endian."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(4 << 20):
            crc = zlib.crc32(block, crc)
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
