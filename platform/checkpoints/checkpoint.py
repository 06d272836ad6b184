"""A Hugging Face checkpoint: config.json and safetensors files, read by byte range, from a disk or from S3."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.safetensors_header import (
    DTYPES,
    SafetensorsFile,
    TensorInfo,
    read_header,
    read_json_object,
)
from expertmesh.platform.weights.files import PART_BYTES, Files
from expertmesh.platform.weights.mirror import open_files

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096
_AHEAD_BYTES = 256 << 20
"""How far `read_each` reads ahead of its caller."""
_APART_BYTES = 1 << 20
"""Rows this long are read one by one, so that the cache of a mirror finds them whichever are read together."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor, or some of its rows, to be read by `Checkpoint.read_each`."""

    name: str
    rows: Sequence[int | None] | None = None
    """Rows of dimension 0 in the order in which they are wanted, None for a row of zeros; without it, all of it."""


class Checkpoint:
    """A checkpoint whose headers were read; tensor data is only read on demand. Safe to share between threads.

    `folder` is the folder (of a checkpoint in S3: its mirror), `config` the parsed config.json, `tensors` maps every
    tensor's name to where it lies, `files` are the safetensors files, `config_digest` is the SHA-256 (hex) of
    config.json's bytes.
    """

    def __init__(
        self, store: Files, config: dict[str, Any], config_digest: str, files: Sequence[SafetensorsFile]
    ) -> None:
        self._store = store
        self.folder = store.folder
        self.config = config
        self.config_digest = config_digest
        self.files = tuple(files)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(files))
        self._bytes_read = 0
        self._waited_s = 0.0
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read through this object so far."""
        with self._lock:
            return self._bytes_read

    @property
    def bytes_fetched(self) -> int:
        """Bytes, headers included, that this object got over the network so far; 0 for files on a disk."""
        return self._store.bytes_fetched

    @property
    def waited_s(self) -> float:
        """Seconds that callers have waited for tensors so far."""
        with self._lock:
            return self._waited_s

    def info(self, name: str) -> TensorInfo:
        """Where `name` lies; CheckpointError if the checkpoint has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored dtype, in fresh memory that the caller owns.

        Reads the tensor's byte range straight into that memory. CheckpointError if there is no such tensor, or if
        the file can't be read, is shorter than when it was opened, or (in S3) is another one.
        """
        return next(self.read_each([Wanted(name)]))

    def read_rows(self, name: str, rows: Sequence[int | None]) -> torch.Tensor:
        """Rows of dimension 0 in the order given: [len(rows), *shape[1:]], reading these rows' bytes only.

        Rows that follow each other in `rows` as in the file are one read; a row that is named twice is read twice, and
        None is a row of zeros. CheckpointError as for `read`, and if the tensor has no dimension 0 or a row is outside
        of it.
        """
        return next(self.read_each([Wanted(name, rows)]))

    def read_each(self, wanted: Iterable[Wanted]) -> Iterator[torch.Tensor]:
        """The tensors of `wanted`, one after the other, while those that follow are read in other threads.

        Each is read straight into the memory in which it is handed over, and at most 256 MiB (or one tensor) wait to
        be. Raises CheckpointError as `read` and `read_rows` do.
        """
        queue: deque[tuple[torch.Tensor, int, list[Future[None]]]] = deque()
        waiting, source = 0, iter(wanted)
        with ThreadPoolExecutor(self._store.parallel) as pool:
            try:
                while True:
                    while not queue or waiting < _AHEAD_BYTES:
                        if (item := next(source, None)) is None:
                            break
                        tensor, stretches = self._prepare(item)
                        name = self.info(item.name).file.name
                        futures = [pool.submit(self._store.read_into, name, at, into) for at, into in stretches]
                        nbytes = sum(len(into) for _, into in stretches)
                        queue.append((tensor, nbytes, futures))
                        waiting += nbytes
                    if not queue:
                        return
                    tensor, nbytes, futures = queue.popleft()
                    self._wait(futures)
                    waiting -= nbytes
                    self._count(nbytes)
                    yield tensor
            finally:
                pool.shutdown(cancel_futures=True)

    def _prepare(self, item: Wanted) -> tuple[torch.Tensor, list[tuple[int, memoryview]]]:
        """Memory for a tensor, and which bytes of its file go where in it: (offset, target)."""
        info = self.info(item.name)
        if item.rows is None:
            tensor = _empty(info, info.shape)
            return tensor, _cut(info.offset, _bytes_of(tensor))
        if not info.shape:
            raise CheckpointError(f"{info.file}: tensor {item.name!r} is a scalar and has no rows")
        for row in item.rows:
            if row is not None and not 0 <= row < info.shape[0]:
                raise CheckpointError(
                    f"{info.file}: tensor {item.name!r} has no row {row}, allowed: 0..{info.shape[0] - 1}"
                )
        tensor = _empty(info, (len(item.rows), *info.shape[1:]))
        row_bytes, target, stretches = info.nbytes // max(1, info.shape[0]), _bytes_of(tensor), []
        for first, last in _runs(item.rows, together=row_bytes < _APART_BYTES):
            begin, into = item.rows[first], target[first * row_bytes : last * row_bytes]
            if begin is None:
                into[:] = bytes(row_bytes)
            else:
                stretches += _cut(info.offset + begin * row_bytes, into)
        return tensor, stretches

    def _wait(self, futures: Iterable[Future[None]]) -> None:
        begin = time.monotonic()
        try:
            for future in futures:
                future.result()
        finally:
            with self._lock:
                self._waited_s += time.monotonic() - begin

    def identity(self, file: SafetensorsFile) -> str | None:
        """What identifies the content of `file` where its store knows such a thing (S3's ETag), else None."""
        return self._store.identity(file.path.name)

    def sample(self, file: SafetensorsFile, pieces: int) -> bytes:
        """Up to `pieces` pieces of 4 KiB, evenly spread over the data of `file`, first and last bytes included."""
        data = file.size - file.data_offset
        last = max(0, data - _SAMPLE_BYTES)
        starts = sorted({last * piece // max(1, pieces - 1) for piece in range(pieces)})
        width = min(_SAMPLE_BYTES, data)
        sampled = bytearray(len(starts) * width)
        for piece, start in enumerate(starts):
            target = memoryview(sampled)[piece * width : (piece + 1) * width]
            self._store.read_into(file.path.name, file.data_offset + start, target)
        self._count(len(sampled))
        return bytes(sampled)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_read += nbytes


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json, the index if there is one, and the headers of the safetensors files; no tensor data.

    `folder` may be the mirror of a checkpoint in S3 (platform.weights.mirror): tensors then come from there. With
    `model.safetensors.index.json` the files are those that it names, else all `*.safetensors` of the folder.
    Raises CheckpointError, naming file and tensor, if the folder, config.json or a named file is missing, a file is
    broken or truncated, the index names a tensor that its file lacks, or two files hold the same tensor.
    """
    folder = Path(folder)
    store = open_files(folder)
    present = store.names()
    config, raw = read_json_object(folder / "config.json")
    weight_map = _read_index(folder / INDEX_NAME) if INDEX_NAME in present else {}
    names = set(weight_map.values()) or {name for name in present if _is_weights_file(name)}
    if not names:
        raise CheckpointError(f"{folder}: holds no *.safetensors file; other weight formats are not read")
    if missing := sorted(names - present):
        raise CheckpointError(f"{folder / missing[0]}: is missing, but {INDEX_NAME} names it")
    with ThreadPoolExecutor(store.parallel) as pool:
        headers = list(pool.map(lambda name: read_header(store, name), sorted(names)))
    checkpoint = Checkpoint(store, config, hashlib.sha256(raw).hexdigest(), headers)
    for name, file in weight_map.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.file.name != file:
            raise CheckpointError(f"{folder / file}: lacks the tensor {name!r} that {INDEX_NAME} puts there")
    return checkpoint


def checkpoint_revision(checkpoint: Checkpoint, samples_per_file: int = 16) -> str:
    """16 hex characters that identify the checkpoint: config.json, each file's name, size, header, and samples of it.

    The samples, pieces of 4 KiB evenly spread over each file, tell two trainings of one architecture apart for a few
    reads; with 0 of them such two share a revision. In S3 the object's ETag does that, and nothing is read. The result
    is the same on every machine that holds the same files, or reads the same objects.
    """
    digest = hashlib.sha256(checkpoint.config_digest.encode())
    for file in sorted(checkpoint.files, key=lambda file: file.path.name):
        digest.update(f"\n{file.path.name!r} {file.size} {file.digest}".encode())
        if (identity := checkpoint.identity(file)) is not None:
            digest.update(identity.encode())
        elif samples_per_file > 0:
            digest.update(hashlib.sha256(checkpoint.sample(file, samples_per_file)).digest())
    return digest.hexdigest()[:16]


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for name, file in weight_map.items():
        # Only siblings of the index: a checkpoint must not be able to name files elsewhere on the machine.
        if not isinstance(file, str) or not _is_weights_file(file):
            raise CheckpointError(
                f"{path}: weight_map puts tensor {name!r} into {file!r}; allowed is a *.safetensors file beside it"
            )
    return weight_map


def _is_weights_file(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and "/" not in name


def _merge(files: Sequence[SafetensorsFile]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in merged:
                raise CheckpointError(f"{file.path}: tensor {name!r} is in {merged[name].file.name} too")
            merged[name] = info
    return merged


def _runs(rows: Sequence[int | None], together: bool) -> list[tuple[int, int]]:
    """Spans [first, last) of positions whose rows follow each other: [5, 6, 7, 1, None] -> [(0, 3), (3, 4), (4, 5)].

    Without `together` each position is a span of its own.
    """
    starts = [
        position
        for position, row in enumerate(rows)
        if not together or position == 0 or row is None or (before := rows[position - 1]) is None or row != before + 1
    ]
    return list(pairwise([*starts, len(rows)]))


def _cut(offset: int, target: memoryview) -> list[tuple[int, memoryview]]:
    """(offset, piece of `target`) for each part of the bytes from `offset` on."""
    return [(offset + start, target[start : start + PART_BYTES]) for start in range(0, len(target), PART_BYTES)]


def _empty(info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
    # Here and not at the top of the file: a CLI or a controller reads headers without waiting for torch.
    import torch

    return torch.empty(shape, dtype=getattr(torch, DTYPES[info.dtype][1]), device="cpu")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, shared, as writable bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data
