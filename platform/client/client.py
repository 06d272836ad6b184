"""OpenAI's clients with a mesh's defaults and `.mesh`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from openai import APIError, AsyncOpenAI, OpenAI

from expertmesh.platform.client._retries import is_generating, pause_before_retry
from expertmesh.platform.client._settings import api_url, checked_key
from expertmesh.platform.client.mesh import AsyncMesh, Mesh

if TYPE_CHECKING:
    import httpx2
    from openai._models import FinalRequestOptions


class Client(OpenAI):
    """OpenAI's client for a mesh, with its admin API as `mesh`.

    A request that generates is tried again (`max_retries` times, 2 by default) only where no earlier try of it can be
    running or have an answer: the connection never opened, or the mesh said 429 or 503 with `Retry-After`. After a
    connection that broke or timed out, and after any other status, the error is yours: the tokens may have been made.
    GET requests are tried again as by `openai.OpenAI`.

    >>> from expertmesh import Client
    >>> with Client() as client:  # doctest: +SKIP
    ...     print(client.mesh.status().health)
    ok
    """

    def __init__(
        self,
        *,
        base_url: str | httpx2.URL | None = None,
        api_key: str | Callable[[], str] | None = None,
        **options: Any,
    ) -> None:
        """base_url: the mesh's URL, with or without /v1; without one $EXPERTMESH_URL, else http://127.0.0.1:8000.
        api_key: the key, or what gives one; without one $EXPERTMESH_API_KEY, else the file $EXPERTMESH_API_KEY_FILE,
        else a placeholder. OpenAI's own environment variables for the two don't count here. `options` are
        `openai.OpenAI`'s others (`timeout`, `max_retries`, `default_headers`, `http_client`, ...).

        Raises ConfigError for a URL or key that can't be one.
        """
        key = api_key if callable(api_key) else checked_key(api_key)
        super().__init__(base_url=api_url(base_url), api_key=key, **options)

    def request(self, cast_to: Any, options: FinalRequestOptions, **stream: Any) -> Any:
        """What all methods of OpenAI's client go through; sends again as the class says."""
        if not is_generating(options.method):
            return super().request(cast_to, options, **stream)
        once, tries = options.model_copy(update={"max_retries": 0}), 1
        while True:
            try:
                return super().request(cast_to, once, **stream)
            except APIError as error:
                pause_s = pause_before_retry(error, tries)
                if pause_s is None or tries > options.get_max_retries(self.max_retries):
                    raise
            time.sleep(pause_s)
            tries += 1

    @cached_property
    def mesh(self) -> Mesh:
        """The admin API."""
        return Mesh(self)


class AsyncClient(AsyncOpenAI):
    """OpenAI's asyncio client for a mesh, with its admin API as `mesh`; sends again as `Client` does."""

    def __init__(
        self,
        *,
        base_url: str | httpx2.URL | None = None,
        api_key: str | Callable[[], Awaitable[str]] | None = None,
        **options: Any,
    ) -> None:
        """As `Client`; `options` are `openai.AsyncOpenAI`'s."""
        key = api_key if callable(api_key) else checked_key(api_key)
        super().__init__(base_url=api_url(base_url), api_key=key, **options)

    async def request(self, cast_to: Any, options: FinalRequestOptions, **stream: Any) -> Any:
        """As `Client.request`."""
        if not is_generating(options.method):
            return await super().request(cast_to, options, **stream)
        once, tries = options.model_copy(update={"max_retries": 0}), 1
        while True:
            try:
                return await super().request(cast_to, once, **stream)
            except APIError as error:
                pause_s = pause_before_retry(error, tries)
                if pause_s is None or tries > options.get_max_retries(self.max_retries):
                    raise
            await asyncio.sleep(pause_s)
            tries += 1

    @cached_property
    def mesh(self) -> AsyncMesh:
        """The admin API."""
        return AsyncMesh(self)
