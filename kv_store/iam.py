"""IAM authentication of ElastiCache: tokens in place of a password."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from urllib.parse import urlencode

import boto3  # type: ignore[import-untyped]
from botocore.auth import SigV4QueryAuth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
from redis.credentials import CredentialProvider

from expertmesh.kv_store.errors import StoreClosed
from expertmesh.kv_store.settings import IamLogin

TOKEN_LIFE_S = 900
"""How long ElastiCache takes an IAM token for a new connection; it allows no longer."""
TOKEN_RENEWAL_S = 600
"""A token of this age is not used again: its clock and ours, and the way there, need some margin."""


def _session_credentials() -> Credentials | None:
    return boto3.Session().get_credentials()


class IamCredentials(CredentialProvider):
    """Tokens for ElastiCache: presigned SigV4 requests for the action `connect`.

    Source: AWS, ElastiCache user guide, "Authenticating with IAM". A token is made without a call to AWS. Safe for
    concurrent use. `clock` is in seconds and may start anywhere.
    """

    def __init__(
        self,
        login: IamLogin,
        username: str,
        credentials: Callable[[], Credentials | None] = _session_credentials,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._login = login
        self._username = username
        self._credentials = credentials
        self._clock = clock
        self._lock = threading.Lock()
        self._token = ""
        self._made = 0.0

    def get_credentials(self) -> tuple[str, str]:
        """The user and a token that a server takes now. Raises StoreClosed if there are no AWS credentials."""
        with self._lock:
            now = self._clock()
            if not self._token or now - self._made >= TOKEN_RENEWAL_S:
                self._token, self._made = self._presigned(), now
            return self._username, self._token

    def _presigned(self) -> str:
        try:
            credentials = self._credentials()
        except BotoCoreError as error:
            raise StoreClosed(f"AWS credentials for the store's IAM authentication can't be had: {error}") from None
        if credentials is None:
            raise StoreClosed("no AWS credentials for the store's IAM authentication")
        query = {"Action": "connect", "User": self._username}
        if self._login.serverless:
            query["ResourceType"] = "ServerlessCache"
        request = AWSRequest(method="GET", url=f"https://{self._login.cache_name}/?{urlencode(query)}")
        SigV4QueryAuth(credentials, "elasticache", self._login.region, expires=TOKEN_LIFE_S).add_auth(request)
        return str(request.url).removeprefix("https://")
