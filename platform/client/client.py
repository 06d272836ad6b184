"""OpenAI's clients with a mesh's defaults and `.mesh`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from openai import AsyncOpenAI, OpenAI

from expertmesh.platform.client._settings import api_url, checked_key
from expertmesh.platform.client.mesh import AsyncMesh, Mesh

if TYPE_CHECKING:
    import httpx2


class Client(OpenAI):
    """OpenAI's client for a mesh, with its admin API as `mesh`.

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

    @cached_property
    def mesh(self) -> Mesh:
        """The admin API."""
        return Mesh(self)


class AsyncClient(AsyncOpenAI):
    """OpenAI's asyncio client for a mesh, with its admin API as `mesh`."""

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

    @cached_property
    def mesh(self) -> AsyncMesh:
        """The admin API."""
        return AsyncMesh(self)
