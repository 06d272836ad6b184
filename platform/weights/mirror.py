"""A folder on this machine that stands for a checkpoint in S3.

`CACHE/s3/BUCKET/NAME-REVISION/` holds `model/`, which vLLM and the tokenizer read like any checkpoint's folder;
`expertmesh-s3.json`, which says where the weights are and what was listed; and `parts/`, what was read of them so
far. In `model/` a *.safetensors file has its header and nothing else: vLLM learns types and shapes from it, and
whoever takes it for the whole file gets an error. REVISION is made of the prefix and of the names, sizes and ETags
that S3 lists, so a checkpoint that is uploaded again gets a folder of its own, and a folder never holds more than its
checkpoint. Nothing is ever evicted: a folder that is not needed any more may be deleted while no mesh runs on it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from expertmesh.errors import CheckpointError
from expertmesh.platform.weights.files import MAX_HEADER_BYTES, Files, LocalFiles
from expertmesh.platform.weights.part_cache import PartCache
from expertmesh.platform.weights.s3 import S3Object, S3Reader, S3Settings
from expertmesh.platform.weights.s3_location import S3Location

log = logging.getLogger("expertmesh.weights")

Progress = Callable[[str, float], None]
"""Called with what is being done, and the fraction of it that is."""

_SOURCE_NAME = "expertmesh-s3.json"
_FORMAT = 1
_SMALL_BYTES = 256 << 20
"""What is longer and no weights is no part of a model."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz")


def is_weights_file(name: str) -> bool:
    """Whether a file holds weights, in whatever format: it is never read as a whole just to open a checkpoint."""
    return name.endswith(_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Source:
    """What expertmesh-s3.json says."""

    location: S3Location
    settings: S3Settings
    weights: Mapping[str, S3Object]
    small: Mapping[str, str]
    """Name -> digest (hex) of each file in `model/`."""

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                "location": asdict(self.location),
                "settings": asdict(self.settings),
                "weights": [asdict(item) for item in self.weights.values()],
                "small": dict(self.small),
            },
            indent=1,
        )

    @classmethod
    def read(cls, path: Path) -> Source | None:
        """None if there is no such file or it is not a whole one of this format."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != _FORMAT:
                return None
            items = [S3Object(**item) for item in data["weights"]]
            weights = {item.name: item for item in items}
            return cls(S3Location(**data["location"]), S3Settings(**data["settings"]), weights, data["small"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s: is damaged (%r); it is made anew", path, error)
            return None


class MirroredFiles(Files):
    """The files behind a mirror: small ones here, weights in S3 and, as far as they were read, in `parts/`."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder = folder
        self.source = source
        self.parallel = source.settings.connections
        self.reader = S3Reader(source.location, source.settings)
        parts = folder.parent / "parts"
        self._caches = {name: PartCache(parts / name, item.size) for name, item in source.weights.items()}

    def names(self) -> frozenset[str]:
        return frozenset(self.source.small) | frozenset(self.source.weights)

    def size(self, name: str) -> int:
        return self._item(name).size

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        self._read(name, offset, target, self.source.settings.keep_tensors)

    def keep(self, name: str, offset: int, target: memoryview) -> None:
        """As `read_into`, and whatever the settings, the part is on this machine's disk afterwards if there is room."""
        self._read(name, offset, target, True)

    def _read(self, name: str, offset: int, target: memoryview, keep: bool) -> None:
        item = self._item(name)
        if offset + len(target) > item.size:
            raise CheckpointError(f"{self.source.location.url(name)}: ends at byte {item.size}")
        cache = self.cache(name)
        if cache.read_into(offset, target):
            return
        self.reader.read_into(item, offset, target)
        if keep:
            cache.add(offset, target)

    def cache(self, name: str) -> PartCache:
        """The parts of one weights file that are here."""
        return self._caches[name]

    def identity(self, name: str) -> str | None:
        return self._item(name).etag

    @property
    def bytes_fetched(self) -> int:
        return self.reader.bytes_fetched

    def _item(self, name: str) -> S3Object:
        try:
            return self.source.weights[name]
        except KeyError:
            raise CheckpointError(f"{self.source.location.url(name)}: is not one of the weights' objects") from None


def mirror(location: S3Location, settings: S3Settings, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The folder that stands for the checkpoint at `location`, its small files fetched where they aren't there yet.

    Lists the prefix each time, so that a changed checkpoint is seen. May run in several processes at once: files
    appear whole, by renaming. Raises CheckpointError if S3 refuses, if nothing there is a checkpoint, or if the folder
    can't be written.
    """
    reader = S3Reader(location, settings)
    listed = reader.list()
    if not listed:
        raise CheckpointError(f"{location.url()}: there is no object under this prefix")
    if not any(item.name == "config.json" for item in listed):
        raise CheckpointError(f"{location.url('config.json')}: is missing; is {location.url()} a checkpoint?")
    name = location.prefix.rpartition("/")[2] or "all"
    folder = cache_dir / "s3" / location.bucket / f"{name}-{_revision(reader, listed)}"
    model = folder / "model"
    try:
        for path in (model, folder / "parts"):
            path.mkdir(parents=True, exist_ok=True)
        source = _fetch_small(reader, listed, folder, progress)
        files = MirroredFiles(model, source)
        with ThreadPoolExecutor(settings.connections) as pool:
            list(pool.map(lambda name: _put_header(files, name), source.weights))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: can't be written ({error.strerror or error})") from error
    return model


def _fetch_small(reader: S3Reader, listed: list[S3Object], folder: Path, progress: Progress | None) -> Source:
    """Fetches the small files that are missing or damaged, and writes down the source."""
    model = folder / "model"
    known = Source.read(folder / _SOURCE_NAME)
    digests = dict(known.small) if known is not None else {}
    small = [item for item in listed if not is_weights_file(item.name) and item.size <= _SMALL_BYTES]
    missing = [item for item in small if not _is_sound(model / item.name, digests.get(item.name))]

    def fetch(item: S3Object) -> None:
        raw = reader.read_whole(item)
        _write_whole(model / item.name, raw, folder)
        digests[item.name] = blake3(raw).hexdigest()

    with ThreadPoolExecutor(reader.settings.connections) as pool:
        for done, _ in enumerate(pool.map(fetch, missing), start=1):
            if progress is not None:
                progress(f"fetching {reader.location.url()}", done / len(missing))
    weights = {item.name: item for item in listed if is_weights_file(item.name)}
    source = Source(reader.location, reader.settings, weights, {item.name: digests[item.name] for item in small})
    if source != known:
        _write_whole(folder / _SOURCE_NAME, source.to_json().encode(), folder)
    return source


def _put_header(files: MirroredFiles, name: str) -> None:
    """Puts the header of a safetensors file into the folder; a broken one is left to whoever opens the checkpoint."""
    path, size = files.folder / name, files.size(name)
    if not name.endswith(".safetensors") or path.is_symlink() or size < 8:
        return
    prefix = bytearray(8)
    files.keep(name, 0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        return
    header = bytearray(length)
    files.keep(name, 8, memoryview(header))
    raw = bytes(prefix + header)
    if not path.exists() or path.read_bytes() != raw:
        _write_whole(path, raw, files.folder.parent)


def open_files(folder: Path) -> Files:
    """The files of a checkpoint's folder, or of the one that it mirrors."""
    source = Source.read(folder.parent / _SOURCE_NAME) if folder.name == "model" else None
    return LocalFiles(folder) if source is None else MirroredFiles(folder, source)


def _revision(reader: S3Reader, listed: list[S3Object]) -> str:
    digest = blake3(f"{reader.settings.endpoint_url} {reader.location.prefix!r}\n".encode())
    for item in listed:
        digest.update(f"{item.name!r} {item.size} {item.etag}\n".encode())
    return digest.hexdigest(length=8)


def _is_sound(path: Path, digest: str | None) -> bool:
    if digest is None:
        return False
    try:
        sound: bool = blake3(path.read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False
    if not sound:
        log.warning("%s: is damaged; it is fetched again", path)
    return sound


def _write_whole(path: Path, raw: bytes, scratch: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".fetching-", dir=scratch)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
