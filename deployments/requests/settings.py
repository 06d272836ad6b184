"""From the configuration to how requests are routed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.config import RequestRouterConfig

from expertmesh.deployments.source import Source
from expertmesh.platform.config import MeshConfig

_ROUTER = "expertmesh.deployments.requests.router.PrefixRouter"


def routes_by_prefix(config: MeshConfig) -> bool:
    """Whether replicas tell what they hold and requests go by it: not where there is nothing to choose from."""
    scaling = config.autoscaling.attention
    replicas = config.attention.replicas if scaling is None else scaling.max_replicas
    return replicas > 1 and config.attention.prefix_caching and config.routing.requests.policy == "prefix"


def metadata_of(source: Source) -> dict[str, Any]:
    """What a replica that serves KV events there publishes as its Serve metadata."""
    return {"kv_events": {"node": source.node, "addresses": list(source.addresses)}}


def source_of(metadata: Mapping[str, Any]) -> Source | None:
    """Where a replica with this metadata serves its KV events; None if it serves none."""
    found = metadata.get("kv_events")
    return None if found is None else Source(found["node"], tuple(found["addresses"]))


def router_options(config: MeshConfig) -> dict[str, Any]:
    """Options of the attention deployment; none leave routing to Serve's own router."""
    if not routes_by_prefix(config):
        return {}
    mesh = config.model_dump(mode="json")
    options: dict[str, Any] = {"request_router_class": _ROUTER, "request_router_kwargs": {"mesh": mesh}}
    return {"request_router_config": RequestRouterConfig(**options)}
