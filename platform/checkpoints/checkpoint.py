"""A Hugging Face folder: config.json and safetensors files, read by byte range."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
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

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096


class Checkpoint:
    """A checkpoint whose headers were read; tensor data is only read on demand. Safe to share between threads.

    `folder` is the folder, `config` the parsed config.json, `tensors` maps every tensor's name to where it lies,
    `files` are the safetensors files, `config_digest` is the SHA-256 (hex) of config.json's bytes.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], config_digest: str, files: Sequence[SafetensorsFile]
    ) -> None:
        self.folder = folder
        self.config = config
        self.config_digest = config_digest
        self.files = tuple(files)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge(files))
        self._bytes_read = 0
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

    def info(self, name: str) -> TensorInfo:
        """Where `name` lies; CheckpointError if the checkpoint has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in its stored dtype, in fresh memory that the caller owns.

        Reads the tensor's byte range straight into that memory. CheckpointError if there is no such tensor, or if
        the file can't be read or is shorter than when it was opened.
        """
        info = self.info(name)
        tensor = _empty(info, info.shape)
        with _Reader(info.file) as reader:
            reader.fill(_bytes_of(tensor), info.offset)
        self._count(info.nbytes)
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Rows of dimension 0 in the order given: [len(rows), *shape[1:]], reading these rows' bytes only.

        Rows that follow each other in `rows` as in the file are one read; a row that is named twice is read twice.
        CheckpointError as for `read`, and if the tensor has no dimension 0 or a row is outside of it.
        """
        info = self.info(name)
        if not info.shape:
            raise CheckpointError(f"{info.file}: tensor {name!r} is a scalar and has no rows")
        for row in rows:
            if not 0 <= row < info.shape[0]:
                raise CheckpointError(f"{info.file}: tensor {name!r} has no row {row}, allowed: 0..{info.shape[0] - 1}")
        tensor = _empty(info, (len(rows), *info.shape[1:]))
        if not rows:
            return tensor
        target, row_bytes = _bytes_of(tensor), info.nbytes // info.shape[0]
        with _Reader(info.file) as reader:
            for first, last in _runs(rows):
                reader.fill(target[first * row_bytes : last * row_bytes], info.offset + rows[first] * row_bytes)
        self._count(len(rows) * row_bytes)
        return tensor

    def sample(self, file: SafetensorsFile, pieces: int) -> bytes:
        """Up to `pieces` pieces of 4 KiB, evenly spread over the data of `file`, first and last bytes included."""
        data = file.size - file.data_offset
        last = max(0, data - _SAMPLE_BYTES)
        starts = sorted({last * piece // max(1, pieces - 1) for piece in range(pieces)})
        sampled = bytearray(len(starts) * min(_SAMPLE_BYTES, data))
        with _Reader(file.path) as reader:
            for piece, start in enumerate(starts):
                width = min(_SAMPLE_BYTES, data)
                reader.fill(memoryview(sampled)[piece * width : (piece + 1) * width], file.data_offset + start)
        self._count(len(sampled))
        return bytes(sampled)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_read += nbytes


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read config.json, the index if there is one, and the headers of the safetensors files; no tensor data.

    With `model.safetensors.index.json` the files are those that it names, else all `*.safetensors` of the folder.
    Raises CheckpointError, naming file and tensor, if the folder, config.json or a named file is missing, a file is
    broken or truncated, the index names a tensor that its file lacks, or two files hold the same tensor.
    """
    folder = Path(folder)
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be read as a folder ({error.strerror})") from error
    config, raw = read_json_object(folder / "config.json")
    weight_map = _read_index(folder / INDEX_NAME) if INDEX_NAME in present else {}
    names = set(weight_map.values()) or {name for name in present if _is_weights_file(name)}
    if not names:
        raise CheckpointError(f"{folder}: holds no *.safetensors file; other weight formats are not read")
    if missing := sorted(names - present):
        raise CheckpointError(f"{folder / missing[0]}: is missing, but {INDEX_NAME} names it")
    paths = [folder / name for name in sorted(names)]
    checkpoint = Checkpoint(folder, config, hashlib.sha256(raw).hexdigest(), [read_header(path) for path in paths])
    for name, file in weight_map.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.file.name != file:
            raise CheckpointError(f"{folder / file}: lacks the tensor {name!r} that {INDEX_NAME} puts there")
    return checkpoint


def checkpoint_revision(checkpoint: Checkpoint, samples_per_file: int = 16) -> str:
    """16 hex characters that identify the checkpoint: config.json, each file's name, size, header, and samples of it.

    The samples, pieces of 4 KiB evenly spread over each file, tell two trainings of one architecture apart for a few
    reads; with 0 of them such two share a revision. The result is the same on every machine that holds the same files.
    """
    digest = hashlib.sha256(checkpoint.config_digest.encode())
    for file in sorted(checkpoint.files, key=lambda file: file.path.name):
        digest.update(f"\n{file.path.name!r} {file.size} {file.digest}".encode())
        if samples_per_file > 0:
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


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Spans [first, last) of positions whose rows follow each other; [5, 6, 7, 1] -> [(0, 3), (3, 4)]."""
    starts = [position for position in range(len(rows)) if position == 0 or rows[position] != rows[position - 1] + 1]
    return list(zip(starts, [*starts[1:], len(rows)], strict=True))


def _empty(info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
    # Here and not at the top of the file: a CLI or a controller reads headers without waiting for torch.
    import torch

    return torch.empty(shape, dtype=getattr(torch, DTYPES[info.dtype][1]))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor, shared, as writable bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Reader:
    """One open file, read by position."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Reader:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self._path}: can't be read ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def fill(self, target: memoryview, offset: int) -> None:
        """Fill `target` from byte `offset` on. A read may return less than asked for (2 GiB at most on Linux)."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._path}: can't be read at {offset + done} ({error.strerror})") from error
            if count == 0:
                raise CheckpointError(f"{self._path}: ends at byte {offset + done}; it was longer when it was opened")
            done += count
