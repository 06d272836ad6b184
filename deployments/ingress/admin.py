"""The mesh's own routes, under /mesh: what it is, where experts are, how loaded they are."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from ray.serve.handle import DeploymentHandle

_TIMEOUT_S = 5.0


def admin_routes(controller: DeploymentHandle[Any]) -> APIRouter:
    """GET /mesh/status, /mesh/placement and /mesh/loads, answered by the controller; 503 while it is away."""
    router = APIRouter(prefix="/mesh", tags=["mesh"])

    async def ask(method: str) -> JSONResponse:
        try:
            return JSONResponse(await asyncio.wait_for(getattr(controller, method).remote(), _TIMEOUT_S))
        except Exception:  # away, restarting or slow: the same to a caller
            # In OpenAI's shape, and not an HTTPException, whose headers vLLM's handler drops.
            error = {"message": "the mesh's controller does not answer", "type": "ServiceUnavailable", "code": 503}
            return JSONResponse({"error": error}, 503, {"Retry-After": "2"})

    @router.get("/status")
    async def status() -> JSONResponse:
        """Replicas, shards, placement epoch, health."""
        return await ask("status")

    @router.get("/placement")
    async def placement() -> JSONResponse:
        """Which expert is in which slot of which shard."""
        return await ask("placement")

    @router.get("/loads")
    async def loads() -> JSONResponse:
        """Tokens dispatched to each expert so far."""
        return await ask("loads")

    return router
