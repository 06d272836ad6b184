"""From the configuration to how requests are routed."""

from __future__ import annotations

from typing import Any

from ray.serve.config import RequestRouterConfig

from expertmesh.deployments.runtime import bind_host
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.transport import Address

_ROUTER = "expertmesh.deployments.requests.router.PrefixRouter"


def routes_by_prefix(config: MeshConfig) -> bool:
    """Whether replicas tell what they hold and requests go by it: not where there is nothing to choose from."""
    scaling = config.autoscaling.attention
    replicas = config.attention.replicas if scaling is None else scaling.max_replicas
    return replicas > 1 and config.attention.prefix_caching and config.routing.requests.policy == "prefix"


def feed_addresses(config: MeshConfig, replica: str) -> list[Address]:
    """Where a replica serves its KV events: as shards do their frames, by `routing.transport`."""
    transport = config.routing.transport
    unix, tcp = Address("unix", f"expertmesh-kv-events-{replica}"), Address("tcp", bind_host(config), 0)
    return {"unix": [unix], "tcp": [tcp], "auto": [unix, tcp]}[transport]


def router_options(config: MeshConfig) -> dict[str, Any]:
    """Options of the attention deployment; none leave routing to Serve's own router."""
    if not routes_by_prefix(config):
        return {}
    mesh = config.model_dump(mode="json")
    options: dict[str, Any] = {"request_router_class": _ROUTER, "request_router_kwargs": {"mesh": mesh}}
    return {"request_router_config": RequestRouterConfig(**options)}
