"""Whose request it is: tenants share no cached KV block, neither in a replica nor in the KV store.

vLLM mixes a request's `cache_salt` into the hash of its first block, and so of all. A prompt that another tenant has
sent before would otherwise be answered sooner, which tells that it was sent.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar

from vllm.v1.engine import EngineCoreRequest

from expertmesh.deployments.ingress.core import RemoteCore

current_tenant: ContextVar[str | None] = ContextVar("tenant", default=None)
"""Of the request at hand; None where no key is asked for."""


def salt_for(tenant: str, asked: str | None) -> str:
    """The salt of a tenant's requests. One that the client asks for divides the tenant's cache further."""
    parts = tenant if asked is None else f"{tenant}\0{asked}"
    return hashlib.sha256(parts.encode(errors="surrogatepass")).hexdigest()[:32]


class TenantCore(RemoteCore):
    """Gives each request the salt of its tenant."""

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Starts a request; its outputs come by `get_output_async`."""
        tenant = current_tenant.get()
        if tenant is not None:
            request.cache_salt = salt_for(tenant, request.cache_salt)
        await super().add_request_async(request)
