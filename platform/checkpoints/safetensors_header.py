"""The header of one safetensors file: which tensors it holds, and where.

A file is `n` (8 bytes, little-endian), `n` bytes of JSON, then the data. The JSON maps each name to
`{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}` with offsets counted from the first byte after the
header; `__metadata__` may hold strings. The data area has neither holes nor overlaps nor bytes after the last tensor
(the format's own rule), so a truncated file is seen here, before anything is loaded.

Nothing in this module reads tensor data, and no size is believed before it was compared with the file's.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from expertmesh.errors import CheckpointError
from expertmesh.platform.weights.files import MAX_HEADER_BYTES, Files

MAX_JSON_BYTES = MAX_HEADER_BYTES
"""Longest header, index or config that is parsed."""

DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
}
"""safetensors name -> (bytes of one element, name in torch)."""

_MAX_DIMENSIONS = 64
_MAX_DIMENSION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `offset` (from the start of `file`), row-major, little-endian."""

    file: Path
    """In the checkpoint's folder; of a mirrored checkpoint it need not exist."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """One file's header. `digest` is the SHA-256 (hex) of the header's JSON as it is in the file."""

    path: Path
    size: int
    data_offset: int
    digest: str
    tensors: dict[str, TensorInfo]


def read_header(files: Files, name: str) -> SafetensorsFile:
    """Read and check the header of the file `name`, and not a byte of what follows it.

    Raises CheckpointError, naming the file and where it applies the tensor, if the file can't be read, is truncated
    or breaks the format, or if a dtype is unknown. Allocates no more than the header's length, which is at most the
    file's.
    """
    path, size = files.folder / name, files.size(name)
    prefix = bytearray(min(8, size))
    files.read_into(name, 0, memoryview(prefix))
    length = _header_length(path, bytes(prefix), size)
    header = bytearray(length)
    files.read_into(name, 8, memoryview(header))
    data_offset = 8 + length
    tensors = _parse(path, bytes(header), data_offset, size)
    return SafetensorsFile(path, size, data_offset, hashlib.sha256(header).hexdigest(), tensors)


def read_json_object(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON object in `path` and the bytes that it was read from; CheckpointError if it isn't one."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is {status.st_size} bytes long, at most {MAX_JSON_BYTES} are allowed")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from error
    return _json_object(path, raw), raw


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated, {size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: bad header, its length is given as {length}, at most {MAX_JSON_BYTES} allowed")
    if length > size - 8:
        raise CheckpointError(f"{path}: truncated, the header is {length} bytes long but {size - 8} follow its length")
    return length


def _parse(path: Path, header: bytes, data_offset: int, size: int) -> dict[str, TensorInfo]:
    tensors = {}
    for name, entry in _json_object(path, header).items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise CheckpointError(f"{path}: bad header, __metadata__ must map strings to strings")
        else:
            tensors[name] = _tensor_info(path, name, entry, data_offset, size)
    _check_ranges(path, tensors, data_offset, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: object, data_offset: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: its header entry must be an object, not {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}, known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: shape must be a list of at most {_MAX_DIMENSIONS} sizes >= 0, not {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be [begin, end] with 0 <= begin <= end, not {offsets!r}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype][0]
    if nbytes != end - begin:
        raise CheckpointError(f"{where}: {dtype} of shape {shape} takes {nbytes} bytes, its offsets give {end - begin}")
    if data_offset + end > size:
        raise CheckpointError(f"{where}: ends at byte {data_offset + end}, but the file is truncated to {size} bytes")
    return TensorInfo(path, dtype, tuple(shape), data_offset + begin, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    # `type(x) is int` and not isinstance: JSON's `true` would pass for 1.
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_DIMENSION for size in value)


def _check_ranges(path: Path, tensors: dict[str, TensorInfo], data_offset: int, size: int) -> None:
    position = data_offset
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            problem = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r}: {problem}: begins at byte {info.offset}, not {position}")
        position += info.nbytes
    if position != size:
        raise CheckpointError(f"{path}: bad header, {size - position} bytes at the end of the file belong to no tensor")


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        # ValueError covers bad UTF-8, bad JSON, repeated keys and integers of thousands of digits.
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result
