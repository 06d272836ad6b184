"""Programs out of Debian's packages, fetched and unpacked but not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def default_cache() -> Path:
    """Where they stay from run to run."""
    return Path(os.environ.get("EXPERTMESH_CACHE") or "~/.cache/expertmesh").expanduser()


def unpacked(packages: Sequence[str], target: Path) -> str | None:
    """Fills the folder `target` with the files of packages, where it isn't there; else why they can't be had.

    Their dependencies are not fetched.
    """
    if target.exists():
        return None
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "this is not Debian"
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        fetch = ["apt-get", "-qq", "download", *packages]
        done = subprocess.run(fetch, cwd=partial, capture_output=True, text=True)
        if done.returncode:  # a machine whose lists of packages are old or were never read
            subprocess.run(["apt-get", "-qq", "update"], capture_output=True)
            done = subprocess.run(fetch, cwd=partial, capture_output=True, text=True)
        if done.returncode:
            return f"Debian's {', '.join(packages)} can't be had: {done.stderr.strip()[-200:]}"
        for package in partial.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, partial], check=True, capture_output=True)
            package.unlink()
        if not target.exists():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return None
