"""`s3://bucket/prefix`: where a checkpoint's objects are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from expertmesh.errors import ConfigError

S3_SCHEME = "s3://"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class S3Location:
    """The objects `prefix/NAME` of a bucket; `prefix` has no slash at either end and may be empty."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """From `s3://bucket/prefix`. ConfigError if it isn't one."""
        bucket, _, prefix = url.removeprefix(S3_SCHEME).partition("/")
        prefix = prefix.removesuffix("/")
        parts = prefix.split("/") if prefix else []
        if not url.startswith(S3_SCHEME) or not _BUCKET.fullmatch(bucket) or any(p in ("", ".", "..") for p in parts):
            raise ConfigError(f"{url!r} is not of the form s3://bucket/prefix")
        return cls(bucket, prefix)

    def key(self, name: str) -> str:
        """The key of the object `name`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def url(self, name: str = "") -> str:
        """For people: of the object `name`, or of the prefix."""
        return f"{S3_SCHEME}{self.bucket}/{self.key(name) if name else self.prefix}"
