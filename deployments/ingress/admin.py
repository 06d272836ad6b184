"""The mesh's own routes, under /mesh: what it is, where experts are, how loaded they are."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException
from ray.serve.handle import DeploymentHandle

_TIMEOUT_S = 5.0


def admin_routes(controller: DeploymentHandle[Any]) -> APIRouter:
    """GET /mesh/status, /mesh/placement and /mesh/loads, answered by the controller; 503 while it is away."""
    router = APIRouter(prefix="/mesh", tags=["mesh"])

    async def ask(method: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await asyncio.wait_for(getattr(controller, method).remote(), _TIMEOUT_S)
        except Exception as error:  # away, restarting or slow: the same to a caller
            raise HTTPException(503, "the mesh's controller does not answer", {"Retry-After": "2"}) from error
        return answer

    @router.get("/status")
    async def status() -> dict[str, Any]:
        """Replicas, shards, placement epoch, health."""
        return await ask("status")

    @router.get("/placement")
    async def placement() -> dict[str, Any]:
        """Which expert is in which slot of which shard."""
        return await ask("placement")

    @router.get("/loads")
    async def loads() -> dict[str, Any]:
        """Tokens dispatched to each expert so far."""
        return await ask("loads")

    return router
