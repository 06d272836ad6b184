"""How many replicas an instance holds, and the arithmetic to show where it holds none.

attention replica, 1 GPU of p5.48xlarge:  weights 60.0 + KV cache 24.0 = 84.0 GiB  >  1 x 80 GiB x 0.9 = 72.0 GiB
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from expertmesh.errors import ConfigError
from expertmesh.platform.hardware.instance_types import InstanceType

USABLE = 0.9
"""Share of a memory that weights and KV cache may take; the rest is activations, graphs, and the host's own needs."""


@dataclass(frozen=True, slots=True)
class ReplicaNeed:
    """What one replica of a deployment takes of a node."""

    what: str
    """For messages: `attention replica`, `expert shard`."""
    cpus: float
    gpus: float = 0.0
    neuron_cores: float = 0.0
    weights_gib: float | None = None
    """None: not known, and memory is not checked."""
    kv_cache_gib: float = 0.0

    @property
    def memory_gib(self) -> float:
        """Weights and KV cache; 0 where the weights aren't known."""
        return 0.0 if self.weights_gib is None else self.weights_gib + self.kv_cache_gib


@dataclass(frozen=True, slots=True)
class Fit:
    """How many replicas a node holds."""

    replicas: int
    limit: str
    """What would be short for one more: CPU, GPU, neuron_cores or memory."""


def fit(need: ReplicaNeed, instance: InstanceType, usable: float = USABLE) -> Fit:
    """How many replicas of `need` one `instance` holds, by CPUs, accelerators and memory.

    A replica with accelerators needs its memory on its share of them, one without needs it in the host's memory.
    Raises ConfigError with the arithmetic if not even one fits.
    """
    limits = {"CPU": _times(instance.vcpus, need.cpus), "GPU": _times(instance.gpus, need.gpus)}
    limits["neuron_cores"] = _times(instance.neuron_cores, need.neuron_cores)
    if need.gpus or need.neuron_cores:
        _check_accelerator_memory(need, instance, usable)
    else:
        limits["memory"] = _times(instance.memory_gib * usable, need.memory_gib)
    limit = min(limits, key=lambda name: limits[name])
    if limits[limit] < 1:
        raise ConfigError(f"{need.what} on {instance.name}: {_shortage(limit, need, instance, usable)}")
    if math.isinf(limits[limit]):
        raise ConfigError(f"{need.what} on {instance.name}: it reserves nothing, so no number of replicas is too many")
    return Fit(int(limits[limit]), limit)


def _times(there: float, each: float) -> float:
    return math.floor(there / each + 1e-9) if each > 0 else math.inf


def _check_accelerator_memory(need: ReplicaNeed, instance: InstanceType, usable: float) -> None:
    accelerator = instance.accelerator
    if accelerator is None or need.memory_gib == 0:
        return  # a missing accelerator is reported as what it is
    share = need.gpus if accelerator.kind == "gpu" else need.neuron_cores / accelerator.cores
    there = share * accelerator.memory_gib * usable
    if need.memory_gib > there:
        raise ConfigError(
            f"{need.what} on {instance.name}: {_sum(need)}; {share:g} {accelerator.name} x {accelerator.memory_gib:g} "
            f"GiB x {usable:g} = {there:.1f} GiB: {need.memory_gib - there:.1f} GiB too much"
        )


def _shortage(limit: str, need: ReplicaNeed, instance: InstanceType, usable: float) -> str:
    match limit:
        case "CPU":
            return f"reserves {need.cpus:g} CPUs of {instance.vcpus}"
        case "GPU":
            return f"reserves {need.gpus:g} GPUs of {instance.gpus}"
        case "neuron_cores":
            return f"reserves {need.neuron_cores:g} neuron_cores of {instance.neuron_cores}"
        case _:
            there = instance.memory_gib * usable
            return (
                f"{_sum(need)}; {instance.memory_gib} GiB of host memory x {usable:g} = {there:.1f} GiB: "
                f"{need.memory_gib - there:.1f} GiB too much"
            )


def _sum(need: ReplicaNeed) -> str:
    return f"weights {need.weights_gib:.1f} + KV cache {need.kv_cache_gib:.1f} = {need.memory_gib:.1f} GiB"
