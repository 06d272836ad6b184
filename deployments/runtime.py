"""What every replica does first, and where on the cluster it finds itself."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

import ray
import ray._raylet
import ray.core.generated.autoscaler_pb2 as autoscaler
from ray import serve

from expertmesh.platform.config import MeshConfig, cluster_secret
from expertmesh.platform.logs import Origin, set_up
from expertmesh.routing.transport import Tls, TlsSettings

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def prepare_replica(config: MeshConfig) -> Origin:
    """Sets up our own log, and vLLM's where lines are JSON; Ray Serve's is Serve's. What to call this replica there."""
    context = serve.get_replica_context()
    origin = Origin(context.deployment, context.replica_id.unique_id)
    set_up(_LEVELS[config.telemetry.log_level], config.telemetry.log_format, origin)
    return origin


def node_id() -> str:
    """Ray's id of this node."""
    return str(ray.get_runtime_context().get_node_id())


def drain_node(node: str, deadline: datetime) -> None:
    """Tells Ray that a node will be gone by then: Serve starts its replicas elsewhere, then tells those here to stop.

    Raises RuntimeError if Ray refuses.
    """
    gcs = ray._raylet.GcsClient(  # type: ignore[attr-defined]  # a C extension
        address=ray.get_runtime_context().gcs_address
    )
    reason = autoscaler.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]  # generated
    accepted, why = gcs.drain_node(node, reason, "it is taken away", int(deadline.timestamp() * 1000))
    if not accepted:
        raise RuntimeError(f"Ray does not drain node {node}: {why}")


def bind_host(config: MeshConfig) -> str:
    """The address that this node's shards listen on."""
    if config.routing.bind_host == "auto":
        return str(ray.util.get_node_ip_address())
    return config.routing.bind_host


def mesh_secret(config: MeshConfig) -> bytes:
    """The cluster's secret, on any node.

    From `routing.secret_file` or the environment; on a machine that has neither, one made for this user. Shards and
    attention replicas on other machines then have another one and refuse each other: a cluster must be given one.
    """
    return cluster_secret(config, create_in=config.model.resolved_cache_dir)


def tls_settings(config: MeshConfig) -> TlsSettings | None:
    """What links between nodes are encrypted with."""
    tls = config.routing.tls
    return None if tls is None else TlsSettings(**tls.model_dump(mode="json"))


def mesh_tls(config: MeshConfig) -> Tls | None:
    """The certificates of this node, once they are found to be in order. Raises ConfigError."""
    settings = tls_settings(config)
    return None if settings is None else Tls(settings)


def secret_path(config: MeshConfig, folder: Path) -> Path:
    """The secret in a file that only this user can read, in a folder that is gone with the replica."""
    path = folder / "secret"
    path.touch(mode=0o600)
    path.write_bytes(mesh_secret(config))
    return path
