"""The cluster file of Ray's launcher (`ray up`) for a mesh on EC2."""

from __future__ import annotations

from typing import Any

from expertmesh.platform.render.aws_sections import AwsCluster, FsxConfig, PoolConfig
from expertmesh.platform.render.cluster_file import ClusterFile
from expertmesh.platform.render.nodes import head_node, pool_node
from expertmesh.platform.render.plan import SLOT, Placed, plan
from expertmesh.platform.render.serve_config import SECRET_FILE

SIDE_LABEL = "expertmesh.io/side"
POOL_LABEL = "expertmesh.io/pool"
MARKET_LABEL = "expertmesh.io/market"

_HEAD = "head"
_CONTAINER = "expertmesh"
_LIMITS = ["--ulimit nofile=65536:65536", "--ulimit memlock=-1:-1"]
_EFA_ENVIRONMENT = {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
_START_HEAD = "ray start --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
_START_WORKER = "ray start --address=$RAY_HEAD_IP:6379"


def ray_cluster(file: ClusterFile) -> dict[str, Any]:
    """The cluster file as a mapping. Raises ConfigError, with the arithmetic, for a mesh that its nodes can't hold."""
    cluster = file.cluster
    placed = plan(file.mesh, cluster)
    types = {_HEAD: _head_type(cluster)} | {each.pool.name: _pool_type(cluster, each) for each in placed}
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(pool.max_nodes for pool in cluster.pools),
        "upscaling_speed": cluster.upscaling_speed,
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "provider": {
            "type": "aws",
            "region": cluster.region,
            "use_internal_ips": cluster.internal_ips,
            "cache_stopped_nodes": False,  # a stopped GPU node may find no capacity to start again
        },
        "auth": _auth(cluster),
        "docker": {
            "image": cluster.images.cpu
            if cluster.head.accelerator == "cpu"
            else _image(cluster, cluster.head.accelerator),
            "container_name": _CONTAINER,
            "pull_before_run": True,
            "run_options": _run_options(cluster),
        },
        "head_node_type": _HEAD,
        "available_node_types": types,
        "file_mounts": {SECRET_FILE.rpartition("/")[0]: cluster.key_folder},
        "initialization_commands": [*cluster.initialization_commands, *_mount(cluster.fsx)],
        "setup_commands": list(cluster.setup_commands),
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", _START_HEAD],
        "worker_start_ray_commands": ["ray stop", _START_WORKER],
    }


def _auth(cluster: AwsCluster) -> dict[str, str]:
    auth = {"ssh_user": cluster.ssh_user}
    if cluster.key_pair is not None:
        auth["ssh_private_key"] = cluster.key_pair.file
    if cluster.ssh_proxy_command is not None:
        auth["ssh_proxy_command"] = cluster.ssh_proxy_command
    return auth


def _head_type(cluster: AwsCluster) -> dict[str, Any]:
    return {
        "resources": {"CPU": cluster.head.hardware.vcpus},
        "labels": {SIDE_LABEL: _HEAD},
        "node_config": head_node(cluster),
    }


def _pool_type(cluster: AwsCluster, placed: Placed) -> dict[str, Any]:
    pool, hardware = placed.pool, placed.pool.hardware
    resources = {"CPU": hardware.vcpus, SLOT[pool.side]: placed.per_node}
    if hardware.gpus:
        resources["GPU"] = hardware.gpus
    if hardware.neuron_cores:
        resources["neuron_cores"] = hardware.neuron_cores
    kind: dict[str, Any] = {
        "min_workers": pool.min_nodes,
        "max_workers": pool.max_nodes,
        "resources": resources,
        "labels": {SIDE_LABEL: pool.side, POOL_LABEL: pool.name, MARKET_LABEL: pool.market},
        "docker": {"worker_image": _image(cluster, pool.accelerator), "worker_run_options": _pool_options(pool)},
        "node_config": pool_node(cluster, pool),
    }
    if pool.idle_timeout_minutes is not None:
        kind["idle_timeout_s"] = pool.idle_timeout_minutes * 60
    return kind


def _image(cluster: AwsCluster, accelerator: str) -> str:
    return str(getattr(cluster.images, accelerator))


def _run_options(cluster: AwsCluster) -> list[str]:
    # boto3 takes no region from the instance: weights in S3 and IAM logins need this one.
    variables = {
        "AWS_DEFAULT_REGION": cluster.region,
        "RAY_BACKEND_LOG_LEVEL": cluster.log_level,
        **cluster.environment,
    }
    mounts = [] if cluster.fsx is None else [f"-v {cluster.fsx.path}:{cluster.fsx.path}"]
    return [*_LIMITS, *mounts, *_variables(variables)]


def _pool_options(pool: PoolConfig) -> list[str]:
    options = ["--gpus=all"] if pool.accelerator == "gpu" else []
    variables = dict(pool.environment)
    if pool.uses_efa:
        options.append("--device=/dev/infiniband")
        variables = _EFA_ENVIRONMENT | variables
    if pool.accelerator == "neuron":
        options += [f"--device=/dev/neuron{index}" for index in range(pool.hardware.accelerators)]
    return options + _variables(variables)


def _variables(variables: dict[str, str]) -> list[str]:
    return [f"-e {name}={value}" for name, value in variables.items()]


def _mount(fsx: FsxConfig | None) -> list[str]:
    if fsx is None:
        return []
    mount = f"sudo mount -t lustre -o relatime,flock {fsx.dns_name}@tcp:/{fsx.mount_name} {fsx.path}"
    return [f"sudo mkdir -p {fsx.path}", f"mountpoint -q {fsx.path} || {mount}"]
