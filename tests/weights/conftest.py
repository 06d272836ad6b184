"""S3 on this machine, a proxy in front of it, and checkpoints pushed to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.s3 import CREDENTIALS, Proxy, s3_client, s3_service
from expertmesh.platform.checkpoints import check_checkpoint
from expertmesh.platform.weights.mirror import mirror
from expertmesh.platform.weights.push import push
from expertmesh.platform.weights.s3 import S3Settings
from expertmesh.platform.weights.s3_location import S3Location


@pytest.fixture(scope="package", autouse=True)
def aws_environment() -> Iterator[None]:
    """What boto3 reads, for this process and its children: credentials of nobody, no files, no instance's role."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        yield


@pytest.fixture(scope="package")
def s3_url() -> Iterator[str]:
    """The URL of an S3, for all tests of this folder."""
    with s3_service() as url:
        yield url


@pytest.fixture
def proxy(s3_url: str) -> Iterator[Proxy]:
    """In front of that S3."""
    proxy = Proxy(s3_url)
    yield proxy
    proxy.stop()


_numbers = itertools.count()


@dataclass(frozen=True)
class Pushed:
    """A checkpoint in a bucket of its own."""

    folder: Path
    """The original."""
    location: S3Location
    proxy: Proxy
    client: Any
    """Straight to S3, past the proxy."""
    settings: S3Settings
    """Through the proxy, and soon tired: three attempts."""

    def mirror(self, cache: Path, **changes: Any) -> Path:
        """Its mirror below `cache`, with changed settings."""
        return mirror(self.location, replace(self.settings, **changes), cache)

    def path(self, name: str) -> str:
        """Of the object `name`, as the proxy names it."""
        return f"/{self.location.bucket}/{self.location.key(name)}"

    def overwrite(self, name: str, raw: bytes) -> None:
        """Puts another object in the place of `name`."""
        self.client.put_object(Bucket=self.location.bucket, Key=self.location.key(name), Body=raw)


@pytest.fixture
def pushed(s3_url: str, proxy: Proxy) -> Callable[[Path], Pushed]:
    """Puts a folder's checkpoint into a fresh bucket, past the proxy."""

    def put(folder: Path) -> Pushed:
        client = s3_client(s3_url)
        location = S3Location(f"bucket-{next(_numbers)}", "models/tiny")
        client.create_bucket(Bucket=location.bucket)
        push(folder, [f.path.name for f in check_checkpoint(folder).files], location, S3Settings(endpoint_url=s3_url))
        return Pushed(folder, location, proxy, client, S3Settings(endpoint_url=proxy.url, attempts=3))

    return put


@pytest.fixture
def qwen(family: Callable[[str], Path], pushed: Callable[[Path], Pushed]) -> Pushed:
    """A tiny checkpoint with one tensor for each matrix of an expert."""
    return pushed(family("qwen3_moe"))


@pytest.fixture
def gpt_oss(family: Callable[[str], Path], pushed: Callable[[Path], Pushed]) -> Pushed:
    """A tiny checkpoint whose experts are rows of fused tensors."""
    return pushed(family("gpt_oss"))
