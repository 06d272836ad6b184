"""The mesh's own routes, under /mesh: what it is, where experts are, how loaded they are."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.handle import DeploymentHandle

_TIMEOUT_S = 5.0
_PLAN_TIMEOUT_S = 30.0
"""A plan over many layers is seconds of work."""


class Freeze(BaseModel):
    """The body of POST /mesh/placement/freeze."""

    model_config = ConfigDict(extra="forbid", strict=True)
    frozen: bool


Number = Annotated[int, Field(ge=1)] | Literal["auto"]


class Scale(BaseModel):
    """The body of POST /mesh/scale."""

    model_config = ConfigDict(extra="forbid", strict=True)
    attention: Number | None = None
    experts: Number | None = None


def admin_routes(controller: DeploymentHandle[Any]) -> APIRouter:
    """/mesh/status, /mesh/loads, /mesh/scale and /mesh/placement, answered by the controller; 503 while it is away."""
    router = APIRouter(prefix="/mesh", tags=["mesh"])

    async def ask(method: str, *arguments: Any, timeout_s: float = _TIMEOUT_S) -> JSONResponse:
        try:
            return JSONResponse(await asyncio.wait_for(getattr(controller, method).remote(*arguments), timeout_s))
        except ValueError as refused:  # Ray's wrapper of it is one, too
            cause = getattr(refused, "cause", refused)
            return JSONResponse({"error": {"message": str(cause), "type": "Conflict", "code": 409}}, 409)
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

    @router.get("/placement/plan")
    async def plan() -> JSONResponse:
        """The moves that would pay now; nothing is carried out."""
        return await ask("plan", timeout_s=_PLAN_TIMEOUT_S)

    @router.post("/placement/apply")
    async def apply() -> JSONResponse:
        """Plans now and begins to carry it out; 409 while another plan is, or where shards have no slot for it."""
        return await ask("apply", timeout_s=_PLAN_TIMEOUT_S)

    @router.post("/placement/freeze")
    async def freeze(wanted: Freeze) -> JSONResponse:
        """Stops re-placing by itself, or starts again."""
        return await ask("freeze", wanted.frozen)

    @router.post("/scale")
    async def scale(wanted: Scale) -> JSONResponse:
        """Sets how many replicas there are to be; 409 for a number that can't be."""
        return await ask("scale", wanted.attention, wanted.experts)

    @router.get("/loads")
    async def loads() -> JSONResponse:
        """Tokens dispatched to each expert so far."""
        return await ask("loads")

    return router
