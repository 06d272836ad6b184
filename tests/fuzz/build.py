"""The extension of routing/native once more, with edge coverage and sanitizers, in a folder of its own."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = Path(__file__).parents[2] / "routing" / "native"
MODULE = "expertmesh.routing.native._frames"
MAP_BYTES = 1 << 13
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-fPIC", "-fvisibility=hidden")
_WATCHED = ("-fsanitize-coverage=trace-pc", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def sanitizer_library() -> Path | None:
    """The library that a process must load first; None where gcc or its sanitizers are missing."""
    if shutil.which("gcc") is None:
        return None
    named = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(named.stdout.strip())
    return path if path.is_absolute() else None


def build(folder: Path, planted: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Compiles into `folder`; the shared library.

    planted: for a file's name, text in it and what takes its place: a bug that the fuzzer must find.
    """
    for source in SOURCES.glob("*.[ch]"):
        text = source.read_text()
        right, wrong = (planted or {}).get(source.name, ("", ""))
        assert right in text, f"{source.name} does not hold what the bug is to replace: {right}"
        (folder / source.name).write_text(text.replace(right, wrong) if right else text)
    shutil.copy(Path(__file__).with_name("coverage.c"), folder)
    library, counter = folder / "_frames.so", folder / "coverage.o"
    watched = [str(path) for path in sorted(folder.glob("*.c")) if path.name != "coverage.c"]
    include = f"-I{sysconfig.get_paths()['include']}"
    _gcc("-c", *_FLAGS, str(folder / "coverage.c"), "-o", str(counter))
    _gcc("-shared", *_FLAGS, *_WATCHED, include, *watched, str(counter), "-o", str(library))
    return library


def _gcc(*arguments: str) -> None:
    done = subprocess.run(["gcc", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"gcc {' '.join(arguments)}\n{done.stderr}")


def load(library: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Makes it the extension of this process, before any other was imported; its map of edge counts, [MAP_BYTES]."""
    assert MODULE not in sys.modules
    import expertmesh.errors  # noqa: F401  (the extension looks for it)

    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    counts = (ctypes.c_uint8 * MAP_BYTES).in_dll(ctypes.CDLL(str(library)), "coverage_map")
    return np.frombuffer(counts, dtype=np.uint8)
