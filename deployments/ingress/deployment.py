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
from expertmesh.deployments.ingress.calls import AttentionCalls
from expertmesh.deployments.ingress.console import console_routes
from expertmesh.deployments.ingress.continuation import Engines
from expertmesh.deployments.ingress.event_stream import event_routes
from expertmesh.deployments.ingress.search import Patience
from expertmesh.deployments.ingress.tenant import TenantCore
from expertmesh.deployments.runtime import mesh_secret, mesh_tls, node_id, prepare_replica
from expertmesh.deployments.source import addresses_for
from expertmesh.deployments.telemetry.ingress import IngressMetrics
from expertmesh.deployments.telemetry.recorder import publish_forever, recorder_for
from expertmesh.deployments.tokens.inbox import Inbox
from expertmesh.deployments.tracing.tracer import Tracing
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.metrics.catalogue import INGRESS

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
        origin = prepare_replica(config)
        self._tracing = None if config.telemetry.traces_endpoint is None else Tracing(config.telemetry, origin)
        tracer = None if self._tracing is None else self._tracing.tracer
        self._controller = controller
        folder = await asyncio.to_thread(model_folder, config.model)
        patience = Patience(config.ingress.replica_timeout_s, config.attention.inactivity_timeout_s)
        arguments = config.attention.engine_args
        engines = Engines(can_force(arguments), stateful_processors=bool(arguments.get("logits_processors")))
        replica = serve.get_replica_context().replica_id.unique_id
        metrics = IngressMetrics(recorder_for(config, INGRESS), replica)
        addresses = addresses_for(config, f"tokens-{replica}")
        self._inbox = Inbox(replica, node_id(), mesh_secret(config), addresses, mesh_tls(config))
        core = TenantCore(AttentionCalls(attention, self._inbox), patience, engines, metrics, tracer)
        self._publishing = asyncio.get_running_loop().create_task(
            publish_forever(lambda: metrics.publish(core.running))
        )
        self._app = await openai_app(config, folder, core, self._healthy, tracer)
        self._app.include_router(admin_routes(controller))
        self._app.include_router(event_routes(controller))
        self._app.include_router(console_routes())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def __del__(self) -> None:
        if (tracing := self.__dict__.get("_tracing")) is not None:
            tracing.close()
        if (inbox := self.__dict__.get("_inbox")) is not None:
            inbox.close()

    async def _healthy(self) -> bool:
        try:
            status: dict[str, Any] = await asyncio.wait_for(self._controller.status.remote(), _HEALTH_TIMEOUT_S)
        except Exception:  # the controller may be away while requests run on
            return True
        return bool(status["health"] == "ok")
