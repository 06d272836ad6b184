"""The ingress deployment."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from expertmesh.deployments.attention.known_tokens import can_force
from expertmesh.deployments.ingress.admin import admin_routes
from expertmesh.deployments.ingress.app import openai_app
from expertmesh.deployments.ingress.continuation import Engines
from expertmesh.deployments.ingress.search import Patience
from expertmesh.deployments.ingress.tenant import TenantCore
from expertmesh.deployments.runtime import prepare_replica
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig

_HEALTH_TIMEOUT_S = 2.0


@serve.ingress()
class Ingress:
    """The OpenAI API and the admin routes, over the attention deployment and the controller."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: MeshConfig,
        attention: DeploymentHandle[Any],
        controller: DeploymentHandle[Any],
        experts: DeploymentHandle[Any] | None = None,
    ) -> None:
        """experts: bound so that Serve deploys them with the application; tokens never go through this handle."""
        prepare_replica(config)
        self._controller = controller
        folder = await asyncio.to_thread(model_folder, config.model)
        patience = Patience(config.ingress.replica_timeout_s, config.attention.inactivity_timeout_s)
        arguments = config.attention.engine_args
        engines = Engines(can_force(arguments), stateful_processors=bool(arguments.get("logits_processors")))
        core = TenantCore(attention, patience, engines)
        self._app = await openai_app(config, folder, core, self._healthy)
        self._app.include_router(admin_routes(controller))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def _healthy(self) -> bool:
        try:
            status: dict[str, Any] = await asyncio.wait_for(self._controller.status.remote(), _HEALTH_TIMEOUT_S)
        except Exception:  # the controller may be away while requests run on
            return True
        return bool(status["health"] == "ok")
