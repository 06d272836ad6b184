"""The Ray Serve config file of a mesh: what `serve deploy` and a RayService's `serveConfigV2` hold."""

from __future__ import annotations

import copy
from typing import Any

from expertmesh.platform.config import MeshConfig
from expertmesh.platform.render.plan import SLOT

SECRET_FILE = "~/expertmesh-keys/cluster"
"""Where the nodes of a Ray cluster find the cluster's secret."""
IMPORT_PATH = "expertmesh.deployments:build_app"


def serve_config(mesh: MeshConfig) -> dict[str, Any]:
    """`mesh` as Ray Serve deploys it on several nodes.

    What the user set is kept, and what only holds on one machine gets a default for several: shards listen on their
    node's address, and the secret comes from SECRET_FILE. Each replica asks for a slot of its side (`plan.SLOT`). The
    HTTP server is Serve's, on the head node, at `ingress.port` of every address: security groups decide who reaches it.
    """
    settings = copy.deepcopy(mesh.model_dump(mode="json", exclude_unset=True))
    routing = settings.setdefault("routing", {})
    routing.setdefault("bind_host", "auto")
    routing.setdefault("secret_file", SECRET_FILE)
    _ask_for_slot(settings.setdefault("attention", {}), "attention")
    if mesh.experts.mode == "mesh":
        _ask_for_slot(settings.setdefault("experts", {}), "experts")
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "0.0.0.0", "port": mesh.ingress.port},
        "logging_config": {"log_level": mesh.telemetry.log_level.upper(), "encoding": "JSON"},
        "applications": [
            {"name": "expertmesh", "import_path": IMPORT_PATH, "route_prefix": "/", "args": {"mesh": settings}},
        ],
    }


def _ask_for_slot(section: dict[str, Any], side: str) -> None:
    section.setdefault("resources", {})[SLOT[side]] = 1
