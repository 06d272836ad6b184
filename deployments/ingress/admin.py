"""The mesh's own routes, under /mesh: what it is, where experts are, how loaded they are."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray.serve.handle import DeploymentHandle

from expertmesh.deployments.ingress.errors import refusal
from expertmesh.platform.client import Heat, History, Loads, MeshStatus, Placement, Plan, Wanted

_TIMEOUT_S = 5.0
_PLAN_TIMEOUT_S = 30.0
"""A plan over many layers is seconds of work."""
_CONFLICT: dict[int | str, dict[str, Any]] = {409: {"description": "Not now, or not with these numbers."}}


class Freeze(BaseModel):
    """The body of POST /mesh/placement/freeze, and its answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    frozen: bool


Number = Annotated[int, Field(ge=1)] | Literal["auto"]


class Scale(BaseModel):
    """The body of POST /mesh/scale."""

    model_config = ConfigDict(extra="forbid", strict=True)
    attention: Number | None = None
    experts: Number | None = None


def away() -> JSONResponse:
    """503; not an HTTPException, whose headers vLLM's handler drops."""
    return refusal(503, "the mesh's controller does not answer", {"Retry-After": "2"})


def admin_routes(controller: DeploymentHandle[Any]) -> APIRouter:
    """/mesh/status, loads, heat, history, scale and placement, answered by the controller; 503 while it is away."""
    router = APIRouter(prefix="/mesh", tags=["mesh"])

    async def ask(method: str, *arguments: Any, timeout_s: float = _TIMEOUT_S) -> JSONResponse:
        try:
            return JSONResponse(await asyncio.wait_for(getattr(controller, method).remote(*arguments), timeout_s))
        except ValueError as refused:  # Ray's wrapper of it is one, too
            cause = getattr(refused, "cause", refused)
            return refusal(409, str(cause))
        except Exception:  # away, restarting or slow: the same to a caller
            return away()

    @router.get("/status", response_model=MeshStatus)
    async def status() -> JSONResponse:
        """Replicas, shards, placement epoch, health."""
        return await ask("status")

    @router.get("/placement", response_model=Placement)
    async def placement() -> JSONResponse:
        """Which expert is in which slot of which shard."""
        return await ask("placement")

    @router.get("/placement/plan", response_model=Plan)
    async def plan() -> JSONResponse:
        """The moves that would pay now; nothing is carried out."""
        return await ask("plan", timeout_s=_PLAN_TIMEOUT_S)

    @router.post("/placement/apply", response_model=Plan, responses=_CONFLICT)
    async def apply() -> JSONResponse:
        """Plans now and begins to carry it out; 409 while another plan is, or where shards have no slot for it."""
        return await ask("apply", timeout_s=_PLAN_TIMEOUT_S)

    @router.post("/placement/freeze", response_model=Freeze)
    async def freeze(wanted: Freeze) -> JSONResponse:
        """Stops re-placing by itself, or starts again."""
        return await ask("freeze", wanted.frozen)

    @router.post("/scale", response_model=Wanted, responses=_CONFLICT)
    async def scale(wanted: Scale) -> JSONResponse:
        """Sets how many replicas there are to be; 409 for a number that can't be."""
        return await ask("scale", wanted.attention, wanted.experts)

    @router.get("/loads", response_model=Loads)
    async def loads() -> JSONResponse:
        """Tokens dispatched to each expert so far."""
        return await ask("loads")

    @router.get("/heat", response_model=Heat)
    async def heat() -> JSONResponse:
        """Rows a second of each expert in the last seconds."""
        return await ask("heat")

    @router.get("/history", response_model=History)
    async def history(after: Annotated[float, Query(allow_inf_nan=False)] = 0.0) -> JSONResponse:
        """The mesh's figures over the last 10 minutes, or those since `after`, in seconds since 1970."""
        return await ask("history", after)

    return router
