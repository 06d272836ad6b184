"""From a folder to S3."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

from expertmesh.errors import CheckpointError
from expertmesh.platform.weights.mirror import is_weights_file
from expertmesh.platform.weights.s3 import S3Reader, S3Settings, explained, whole_crc32
from expertmesh.platform.weights.s3_location import S3Location
from expertmesh.platform.weights.whole import file_crc32

_PART_BYTES = 64 << 20
_FILES_AT_ONCE = 2
_STORAGE_CLASS = "INTELLIGENT_TIERING"
_NEEDED = "s3:ListBucket on the bucket, s3:GetObject and s3:PutObject on the prefix"


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did."""

    uploaded: tuple[str, ...]
    skipped: tuple[str, ...]
    """Files that were there with the same size and CRC-32."""
    bytes_uploaded: int


def push(
    folder: Path,
    weights: Sequence[str],
    location: S3Location,
    settings: S3Settings,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Uploads the files `weights` of `folder`, and those beside them that hold no weights, to `location`.

    Large files go in parts, several at once; each object carries the CRC-32 of the whole file, which S3 compares before
    it takes it. The weights go first and config.json last: a prefix without it is no checkpoint. `progress` gets the
    bytes done and the bytes of all files, from several threads. Raises CheckpointError if the prefix holds
    *.safetensors files that the folder lacks, a file can't be read, or S3 refuses.
    """
    client = settings.client(settings.attempts)
    try:
        beside = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        small = sorted((name for name in beside if not is_weights_file(name)), key=lambda name: name == "config.json")
        sizes = {name: (folder / name).stat().st_size for name in (*weights, *small)}
        _refuse_strangers(location, settings, set(sizes))
        upload = _Upload(client, folder, location, settings, sizes, progress)
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            done = list(pool.map(upload.file, weights))
        done += [upload.file(name) for name in small]
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: can't be read ({error.strerror or error})") from error
    uploaded = tuple(name for name, fresh in zip(sizes, done, strict=True) if fresh)
    skipped = tuple(name for name, fresh in zip(sizes, done, strict=True) if not fresh)
    return Pushed(uploaded, skipped, sum(sizes[name] for name in uploaded))


class _Upload:
    def __init__(
        self,
        client: Any,
        folder: Path,
        location: S3Location,
        settings: S3Settings,
        sizes: dict[str, int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._client = client
        self._folder = folder
        self._location = location
        self._settings = settings
        self._sizes = sizes
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._parts = TransferConfig(
            multipart_threshold=_PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=max(1, settings.connections // _FILES_AT_ONCE),
        )

    def file(self, name: str) -> bool:
        """Uploads one file; False if it was there with the same size and checksum."""
        target = {"Bucket": self._location.bucket, "Key": self._location.key(name)}
        crc = file_crc32(self._folder / name)
        try:
            if self._is_there(target, name, crc):
                self._advance(self._sizes[name])
                return False
            self._client.upload_file(
                str(self._folder / name),
                *target.values(),
                ExtraArgs={
                    "ChecksumAlgorithm": "CRC32",
                    "ChecksumCRC32": crc,
                    "StorageClass": _STORAGE_CLASS,
                    **self._settings.payer,
                },
                Callback=self._advance,
                Config=self._parts,
            )
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise explained(error, self._location.url(name), _NEEDED) from error
        return True

    def _is_there(self, target: dict[str, str], name: str, crc: str) -> bool:
        try:
            answer = self._client.head_object(**target, ChecksumMode="ENABLED", **self._settings.payer)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return False
            raise
        return bool(answer["ContentLength"] == self._sizes[name] and whole_crc32(answer) == crc)

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, sum(self._sizes.values()))


def _refuse_strangers(location: S3Location, settings: S3Settings, ours: set[str]) -> None:
    """A reader would take the *.safetensors files of another checkpoint for part of this one."""
    there = {item.name for item in S3Reader(location, settings).list()}
    strangers = sorted(name for name in there - ours if ".safetensors" in name)
    if strangers:
        raise CheckpointError(
            f"{location.url(strangers[0])}: is there, but the folder has no such file; choose another prefix, or "
            "delete what is under this one"
        )
