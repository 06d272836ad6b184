"""Calling AWS so that every failure is one AwsError with a sentence to act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    PartialCredentialsError,
)

from expertmesh.platform.aws.errors import AwsError


def client(service: str, region: str) -> Any:
    """A client with the usual chain of credentials. Raises AwsError."""
    with asking(f"{service} in {region}"):
        return boto3.Session(region_name=region).client(service)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turns what boto3 raises inside into AwsError that begins with `what`."""
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise AwsError(
            f"{what}: no AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in "
            "with `aws sso login`"
        ) from None
    except EndpointConnectionError as error:
        raise AwsError(f"{what}: AWS can't be reached; is the region right? ({error})") from None
    except ClientError as error:
        answer = error.response.get("Error", {})
        raise AwsError(f"{what}: {answer.get('Code', 'refused')}: {answer.get('Message', error)}") from None
    except BotoCoreError as error:
        raise AwsError(f"{what}: {error}") from None
