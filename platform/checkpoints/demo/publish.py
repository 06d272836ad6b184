"""Folders that are either complete or not there, however a build ends and however many processes want one."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from expertmesh.errors import CheckpointError


def build_once(folder: Path, build: Callable[[Path], None], on_wait: Callable[[], None] = lambda: None) -> Path:
    """`folder`, made by `build` if it isn't there yet.

    `build` gets an empty folder beside it, which becomes `folder` by one rename after `build` returned. If it raises,
    the exception passes through and nothing is left; what a killed process left is removed by the next build. Builds of
    the same folder exclude each other, also across processes; `on_wait` is called once if another one must be waited
    for.

    Raises CheckpointError if the parent folder can't be made or written.
    """
    if folder.is_dir():
        return folder
    lock = _lock_of(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        if not folder.is_dir():
            _build_and_rename(folder, build)
    finally:
        lock.release()
    return folder


def _lock_of(folder: Path) -> FileLock:
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise CheckpointError(
            f"cache folder {folder.parent}: can't be written ({error}); name one that can be"
        ) from error
    return FileLock(path)


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    """Only called with the lock held, so any unfinished folder that lies there belongs to a process that died."""
    prefix = f".{folder.name}.building-"
    for abandoned in folder.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(unfinished)
        unfinished.chmod(0o755)  # mkdtemp's 0700 would keep other users' processes out of a shared cache.
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
