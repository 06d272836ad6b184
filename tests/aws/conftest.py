"""AWS on moto, in this process: no request leaves the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "aws").glob("*.yaml"))

Requests = list[tuple[str, dict[str, Any]]]


@contextmanager
def aws_account(home: Path) -> Iterator[Requests]:
    """An empty account. Yields every EC2 request as (operation, parameters), before moto drops what it doesn't know.

    Ray keeps clients for the life of a process and writes a key pair below the home folder: both start afresh.
    """
    seen: Requests = []
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("HOME", str(home))
        _forget_clients_of_ray()
        boto3.setup_default_session(region_name="us-east-1")
        session = boto3.DEFAULT_SESSION
        assert session is not None
        session.events.register("before-parameter-build.ec2", _recorder(seen))
        yield seen
        boto3.DEFAULT_SESSION = None
        _forget_clients_of_ray()


def _recorder(seen: Requests) -> Callable[..., None]:
    def record(params: dict[str, Any], model: Any, **_: Any) -> None:
        seen.append((model.name, dict(params)))

    return record


def _forget_clients_of_ray() -> None:
    from ray.autoscaler._private.aws import config, utils

    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()
    config._get_subnets_or_die.cache_clear()
