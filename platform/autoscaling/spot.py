"""Whether this machine is about to be taken away, by the instance metadata service of EC2 (version 2, with tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self

import httpx

_TOKEN_PATH = "/latest/api/token"
_NOTICE_PATH = "/latest/meta-data/spot/instance-action"
_TOKEN_TTL_S = 21600
_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Notice:
    """What will be done to the machine, and when."""

    action: str
    """`terminate`, `stop` or `hibernate`."""
    at: datetime


class InstanceMetadata:
    """Asks the metadata service; no proxy is used and no redirect followed."""

    def __init__(self, url: str) -> None:
        """url: `http://169.254.169.254` on EC2."""
        self._client = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False)
        self._token = ""

    async def notice(self) -> Notice | None:
        """The notice of a spot instance's interruption, two minutes before; None if there is none.

        Raises httpx.HTTPError if the service can't be asked, ValueError if what it says is no notice.
        """
        response = await self._ask()
        if response.status_code == httpx.codes.UNAUTHORIZED:  # the token is too old
            self._token = ""
            response = await self._ask()
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        response.raise_for_status()
        said = response.json()
        if not isinstance(said, dict) or not {"action", "time"} <= set(said):
            raise ValueError(f"no notice of an interruption: {response.text[:200]!r}")
        return Notice(str(said["action"]), datetime.fromisoformat(str(said["time"])))

    async def _ask(self) -> httpx.Response:
        if not self._token:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
            response = await self._client.put(_TOKEN_PATH, headers=headers)
            response.raise_for_status()
            self._token = response.text
        return await self._client.get(_NOTICE_PATH, headers={"X-aws-ec2-metadata-token": self._token})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()
