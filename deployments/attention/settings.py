"""From the configuration to how an engine's dispatcher behaves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from expertmesh.deployments.runtime import tls_settings
from expertmesh.platform.config import MeshConfig


def dispatch_settings(config: MeshConfig, node: str, revision: str) -> dict[str, Any]:
    """DispatchSettings as JSON. node: this node's id; revision: of the checkpoint."""
    routing = config.routing
    tls = tls_settings(config)
    return {
        "node": node,
        "revision": revision,
        "policy": routing.policy,
        "transport": routing.transport,
        "limits": {"max_rows": routing.max_frame_rows, "max_bytes": routing.max_frame_mib << 20},
        "frame_deadline_s": routing.frame_deadline_ms / 1000,
        "hedge_after_s": routing.hedge_after_ms / 1000,
        "hedge_service_times": routing.hedge_service_times,
        "connect_timeout_s": routing.connect_timeout_s,
        "unavailable_timeout_s": routing.unavailable_timeout_s,
        "tls": None if tls is None else asdict(tls),
    }
