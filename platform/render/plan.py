"""Which replicas go to which pool, and whether they fit: the arithmetic between a mesh and its nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from expertmesh.errors import ConfigError
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.hardware import Fit, ReplicaNeed, fit
from expertmesh.platform.hardware.fit import USABLE
from expertmesh.platform.render.aws_sections import AwsCluster, PoolConfig, WeightsConfig

Side = Literal["attention", "experts"]
SLOT = {"attention": "expertmesh_attention", "experts": "expertmesh_experts"}
"""Ray resource of a node by side: as many as replicas fit. Each replica asks for one, so it lands on its side only."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A pool and how many replicas each of its nodes takes."""

    pool: PoolConfig
    per_node: int


def plan(mesh: MeshConfig, cluster: AwsCluster) -> tuple[Placed, ...]:
    """One item a pool. Raises ConfigError, with the arithmetic, for what can't run on these nodes."""
    _check_sides(mesh, cluster)
    placed = tuple(Placed(pool, _per_node(pool, mesh, cluster)) for pool in cluster.pools)
    for side in _sides(mesh):
        _check_room(side, mesh, [each for each in placed if each.pool.side == side])
    return placed


def needed_replicas(mesh: MeshConfig, side: Side) -> int:
    """Replicas of a side at most."""
    if side == "experts":
        shards = mesh.autoscaling.experts
        return mesh.experts.shards if shards is None else shards.max_shards
    scaling = mesh.autoscaling.attention
    return mesh.attention.replicas if scaling is None else scaling.max_replicas


def need_of(mesh: MeshConfig, cluster: AwsCluster, side: Side) -> ReplicaNeed:
    """What one replica of a side takes."""
    attention, experts, sizes = mesh.attention, mesh.experts, cluster.weights
    if side == "experts":
        shard = None if sizes is None else _shard_gib(mesh, sizes)
        return ReplicaNeed(
            "expert shard", experts.cpus, experts.gpus, experts.resources.get("neuron_cores", 0.0), shard
        )
    whole = None
    if sizes is not None:
        whole = sizes.attention_gib + (sizes.experts_gib if experts.mode == "colocated" else 0.0)
    return ReplicaNeed(
        "attention replica",
        attention.cpus,
        attention.gpus,
        attention.resources.get("neuron_cores", 0.0),
        whole,
        attention.kv_cache_gib or (0.0 if attention.gpus or attention.resources.get("neuron_cores") else 1.0),
    )


def _shard_gib(mesh: MeshConfig, sizes: WeightsConfig) -> float:
    """Weights of one shard: in each layer its share of all copies, spare slots, and one to load into while it serves.

    With autoscaling, of the fewest shards, which hold the most each.

    256 experts, 16 shards, redundancy 2, no spare slots, re-placement on: 256 x 2 / 16 + 0 + 1 = 33 of 256 experts.
    """
    experts, scaling, each_layer = mesh.experts, mesh.autoscaling.experts, sizes.experts_per_layer
    shards = experts.shards if scaling is None else scaling.min_shards
    if each_layer is None:
        return sizes.experts_gib * experts.redundancy / shards
    slots = math.ceil(each_layer * experts.redundancy / shards)
    return sizes.experts_gib * (slots + experts.spare_slots + mesh.routing.rebalance.enabled) / each_layer


def _sides(mesh: MeshConfig) -> tuple[Side, ...]:
    return ("attention",) if mesh.experts.mode == "colocated" else ("attention", "experts")


def _check_sides(mesh: MeshConfig, cluster: AwsCluster) -> None:
    for side in _sides(mesh):
        if not any(pool.side == side for pool in cluster.pools):
            raise ConfigError(f"cluster.pools: none has side {side!r}, and the mesh has {side} replicas")
    for pool in cluster.pools:
        if pool.side not in _sides(mesh):
            raise ConfigError(f"cluster.pools: {pool.name} is for experts, but experts.mode is colocated")
        if pool.accelerator == "neuron" and mesh.experts.mode != "colocated":
            raise ConfigError(
                f"cluster.pools: {pool.name} has Neuron devices, whose compiler takes whole graphs; "
                "use experts.mode: colocated"
            )


def _per_node(pool: PoolConfig, mesh: MeshConfig, cluster: AwsCluster) -> int:
    need = need_of(mesh, cluster, pool.side)
    if pool.accelerator == "neuron" and not need.neuron_cores:
        raise ConfigError(f"mesh.attention.resources.neuron_cores: missing, and pool {pool.name} has Neuron devices")
    share = mesh.attention.engine_args.get("gpu_memory_utilization") if pool.side == "attention" else None
    found: Fit = fit(need, pool.hardware, float(share) if isinstance(share, int | float) else USABLE)
    wanted = pool.replicas_per_node
    if wanted is not None and wanted > found.replicas:
        raise ConfigError(
            f"cluster.pools: {pool.name}: replicas_per_node is {wanted}, but {pool.instance_type} holds "
            f"{found.replicas} ({found.limit} is short)"
        )
    return found.replicas if wanted is None else wanted


def _check_room(side: Side, mesh: MeshConfig, placed: list[Placed]) -> None:
    room = sum(each.per_node * each.pool.max_nodes for each in placed)
    needed = needed_replicas(mesh, side)
    if needed > room:
        terms = " + ".join(f"{each.pool.max_nodes} x {each.per_node} ({each.pool.name})" for each in placed)
        raise ConfigError(f"cluster.pools: {needed} {side} replicas, but the pools hold {terms} = {room}")
