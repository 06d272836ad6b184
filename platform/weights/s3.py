"""S3 as a checkpoint needs it: list, small objects whole, and byte ranges of large ones into memory that is there.

Every GET names the ETag that the listing gave, so an object that changed under way is refused by S3 itself (412), and
the answer's ETag and range are compared again. What S3 calls a transient error, a broken connection and a body that
ends early are tried again, a body from the byte where it broke. Whole objects are compared with the checksum that S3
keeps, where it is one that botocore can compute; S3 gives none with a byte range.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from urllib3.exceptions import HTTPError

from expertmesh.errors import CheckpointError
from expertmesh.platform.weights.s3_location import S3Location

_T = TypeVar("_T")

_WINDOW_BYTES = 256 << 10
"""A body goes to its destination in steps of this size, through memory that stays in the processor's cache."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_NEEDED = "s3:ListBucket on the bucket and s3:GetObject on the prefix"
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "InternalError"})
_BROKEN = (
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    HTTPError,
    HTTPException,
    IncompleteReadError,
    OSError,
    ResponseParserError,
    ResponseStreamingError,
)
_FAILURES = (BotoCoreError, ClientError, HTTPError, HTTPException, OSError, ResponseParserError)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """How S3 is reached. Credentials are never among these: boto3 finds them where it always does."""

    endpoint_url: str | None = None
    region: str | None = None
    requester_pays: bool = False
    connections: int = 16
    """GETs at once, in each process."""
    attempts: int = 8
    """Failures in a row, without a byte of progress, after which a read is given up."""
    keep_tensors: bool = True
    """Whether tensors that were read stay on this machine's disk for the next start."""

    @property
    def payer(self) -> dict[str, str]:
        """The argument of a request to a bucket whose requests are paid by who makes them."""
        return {"RequestPayer": "requester"} if self.requester_pays else {}

    def client(self, attempts: int) -> Any:
        """A client that tries each request up to `attempts` times."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            config=Config(
                retries={"total_max_attempts": attempts, "mode": "standard"},
                max_pool_connections=self.connections,
                connect_timeout=10,
                read_timeout=30,
                response_checksum_validation="when_required",
                tcp_keepalive=True,
            ),
        )


@dataclass(frozen=True, slots=True)
class S3Object:
    """One object as it was listed."""

    name: str
    """Its key without the prefix."""
    size: int
    etag: str
    """With its quotation marks, as S3 writes it."""


class S3Reader:
    """Reads the objects of one location. Safe to share between threads."""

    def __init__(self, location: S3Location, settings: S3Settings) -> None:
        self.location = location
        self.settings = settings
        self._bytes_fetched = 0
        self._lock = threading.Lock()
        self._made: Any = None

    @property
    def _client(self) -> Any:
        with self._lock:  # made when it is needed: with all parts in the cache it never is
            if self._made is None:
                self._made = self.settings.client(1)
            return self._made

    @property
    def bytes_fetched(self) -> int:
        """Bytes of bodies that arrived so far, those of broken transfers included."""
        with self._lock:
            return self._bytes_fetched

    def list(self) -> list[S3Object]:
        """The objects right below the prefix, by name, without hidden ones. CheckpointError if they can't be listed."""
        found: list[S3Object] = []
        start = self.location.key("") if self.location.prefix else ""
        request = {"Bucket": self.location.bucket, "Prefix": start, "Delimiter": "/", **self.settings.payer}
        while True:
            page = self._again(lambda: self._page(request), self.location.url())
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(start)
                if name and not name.startswith(".") and "/" not in name:
                    found.append(S3Object(name, int(entry["Size"]), entry["ETag"]))
            if not page["IsTruncated"]:
                break
            request["ContinuationToken"] = page["NextContinuationToken"]
        return sorted(found, key=lambda item: item.name)

    def _page(self, request: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(**request)
        if "IsTruncated" not in page:  # botocore takes a body that broke off before its first byte for an empty answer
            raise ResponseStreamingError(error="the list is empty, not even of objects")
        return page

    def read_whole(self, item: S3Object) -> bytes:
        """All of a small object, compared with its checksum where S3 keeps one. CheckpointError as for `read_into`."""

        def get() -> bytes:
            answer = self._get(item, ChecksumMode="ENABLED")
            with closing(answer["Body"]) as body:
                raw: bytes = body.read()
            self._count(len(raw))
            return raw

        raw = self._again(get, self.location.url(item.name))
        if len(raw) != item.size:
            raise CheckpointError(f"{self.location.url(item.name)}: {len(raw)} bytes came, listed were {item.size}")
        return raw

    def read_into(self, item: S3Object, offset: int, target: memoryview) -> None:
        """Fill `target` with the object's bytes from `offset` on.

        CheckpointError, naming object and range, if it changed since it was listed, or if S3 refuses or fails for
        longer than `attempts`.
        """
        last = offset + len(target) - 1
        where = f"{self.location.url(item.name)}: bytes {offset}-{last}"
        done = failures = 0
        while done < len(target):
            before = done
            try:
                answer = self._get(item, Range=f"bytes={offset + done}-{last}")
                expected = f"bytes {offset + done}-{last}/{item.size}"
                if answer.get("ContentRange") != expected:
                    answer["Body"].close()
                    raise CheckpointError(
                        f"{where}: the answer holds {answer.get('ContentRange')!r}, asked for {expected!r}"
                    )
                with closing(answer["Body"]) as body:
                    while done < len(target):
                        count = body.readinto(target[done : done + _WINDOW_BYTES])
                        if count == 0:
                            raise IncompleteReadError(actual_bytes=done, expected_bytes=len(target))
                        done += count
            except _FAILURES as error:
                failures = 1 if done > before else failures + 1
                self._pause_or_raise(error, failures, where)
            finally:
                self._count(done - before)

    def _get(self, item: S3Object, **arguments: str) -> dict[str, Any]:
        key = self.location.key(item.name)
        answer: dict[str, Any] = self._client.get_object(
            Bucket=self.location.bucket, Key=key, IfMatch=item.etag, **self.settings.payer, **arguments
        )
        if answer.get("ETag") != item.etag:
            answer["Body"].close()
            raise _changed(self.location.url(item.name), item.etag)
        return answer

    def crc32(self, item: S3Object) -> str | None:
        """The base64 CRC-32 of the whole object where S3 keeps one, else None."""
        answer = self._again(
            lambda: self._client.head_object(
                Bucket=self.location.bucket,
                Key=self.location.key(item.name),
                IfMatch=item.etag,
                ChecksumMode="ENABLED",
                **self.settings.payer,
            ),
            self.location.url(item.name),
        )
        return whole_crc32(answer)

    def _again(self, action: Callable[[], _T], where: str) -> _T:
        failures = 0
        while True:
            try:
                return action()
            except _FAILURES as error:
                failures += 1
                self._pause_or_raise(error, failures, where)

    def _pause_or_raise(self, error: Exception, failures: int, where: str) -> None:
        """Waits before the next attempt; CheckpointError if none can help or `failures` in a row are enough."""
        if not _is_transient(error):
            raise explained(error, where) from error
        if failures >= self.settings.attempts:
            raise CheckpointError(f"{where}: given up after {failures} failures in a row, the last: {error}") from error
        # "Full jitter": many processes that start together must not come back together.
        time.sleep(random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures)))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_fetched += nbytes


def whole_crc32(answer: dict[str, Any]) -> str | None:
    """The CRC-32 in an answer to HEAD if it is that of the object, not one made of its parts' (`...-N`)."""
    value = answer.get("ChecksumCRC32")
    return value if isinstance(value, str) and "-" not in value else None


def explained(error: Exception, where: str, needed: str = _NEEDED) -> CheckpointError:
    """What a user can do about an error of S3's that trying again won't help; `needed` are the permissions."""
    if isinstance(error, NoCredentialsError):
        return CheckpointError(f"{where}: no AWS credentials were found (environment, profile, role of the instance)")
    if not isinstance(error, ClientError):
        return CheckpointError(f"{where}: {error}")
    code, status = _code(error), _status(error)
    if status == 412:
        return _changed(where)
    if status == 403:
        return CheckpointError(
            f"{where}: access denied ({code}); needed are {needed}, and requester_pays for a bucket that asks for it"
        )
    if code == "NoSuchBucket":
        return CheckpointError(f"{where}: there is no such bucket")
    if status == 404:
        return CheckpointError(f"{where}: the object is gone since it was listed")
    return CheckpointError(f"{where}: {error}")


def _changed(where: str, etag: str = "") -> CheckpointError:
    was = f" (its ETag was {etag})" if etag else ""
    return CheckpointError(f"{where}: the object changed since it was listed{was}; start again to read the new one")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _status(error) >= 500 or _status(error) == 429 or _code(error) in _TRANSIENT_CODES
    return isinstance(error, _BROKEN)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
