"""Ray's autoscaler v2 with its own provider of fake nodes: raylets on one machine that come and go as nodes would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OBJECT_STORE_BYTES = 100 << 20
MOST = 6
"""Nodes of a type, and in all."""
IDLE_S = 6.0
"""How long a node is idle before it goes."""
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
_HEAD_TYPE = "ray.head.default"

AUTOSCALER_ENVIRONMENT = {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}
"""Of the head's Ray."""


def autoscaling(gcs_address: str, types: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What `ray start --autoscaling-config` reads. types: the resources of each node type."""
    workers = {
        name: {
            "resources": {"CPU": 0, **resources, "object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MOST,
        }
        for name, resources in types.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": MOST,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            **workers,
        },
        "upscaling_speed": 1.0,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{f"{kind}_commands": [] for kind in ("setup", "initialization", "head_setup", "worker_setup")},
        **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "file_mounts_sync_continuously": False,
    }
