"""The table of EC2 instance types that a mesh is planned for.

vCPUs, memory, network cards and EFA interfaces are those of EC2's DescribeInstanceTypes; tests compare them with the
copy that moto carries. Bandwidth and TFLOPs are the accelerator makers' data sheets, dense, per accelerator. Prices are
a dated snapshot for comparing layouts, never for billing; a type without one has none that we could check.
"""

from __future__ import annotations

import datetime
import difflib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from expertmesh.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One GPU or Neuron device."""

    name: str
    kind: Literal["gpu", "neuron"]
    memory_gib: float
    """As the data sheet rounds it."""
    bandwidth_tb_s: float
    """Of its memory."""
    bf16_tflops: float
    fp8_tflops: float
    cores: int = 0
    """NeuronCores of one device, which Ray counts as `neuron_cores`; 0 for GPUs."""


@dataclass(frozen=True, slots=True)
class Price:
    """On-demand, Linux, shared tenancy."""

    usd_per_hour: float
    region: str
    date: datetime.date
    source: str


@dataclass(frozen=True, slots=True)
class InstanceType:
    """What one instance has."""

    name: str
    vcpus: int
    memory_gib: int
    network_gbps: float
    network_cards: int = 1
    efa: int = 0
    """EFA interfaces at most; 0: no EFA."""
    accelerator: Accelerator | None = None
    accelerators: int = 0
    capacity_blocks: bool = False
    """Whether Capacity Blocks for ML can be bought for it."""
    price: Price | None = None

    @property
    def accelerator_gib(self) -> float:
        """Memory of all accelerators together."""
        return self.accelerators * self.accelerator.memory_gib if self.accelerator is not None else 0.0

    @property
    def gpus(self) -> int:
        """What Ray counts as GPU."""
        return self.accelerators if self.accelerator is not None and self.accelerator.kind == "gpu" else 0

    @property
    def neuron_cores(self) -> int:
        """What Ray counts as `neuron_cores`. Ray 2.58 doesn't find those of trn2 by itself."""
        return self.accelerators * self.accelerator.cores if self.accelerator is not None else 0


H100 = Accelerator("H100", "gpu", 80, 3.35, 989, 1979)
H200 = Accelerator("H200", "gpu", 141, 4.8, 989, 1979)
B200 = Accelerator("B200", "gpu", 180, 8.0, 2250, 4500)
L40S = Accelerator("L40S", "gpu", 48, 0.86, 362, 733)
TRAINIUM = Accelerator("Trainium", "neuron", 32, 0.82, 190, 190, cores=2)
TRAINIUM2 = Accelerator("Trainium2", "neuron", 96, 2.9, 667, 1299, cores=8)
INFERENTIA2 = Accelerator("Inferentia2", "neuron", 32, 0.82, 190, 190, cores=2)


def _price(usd_per_hour: float) -> Price:
    return Price(usd_per_hour, "us-east-1", datetime.date(2026, 7, 1), "AWS EC2 on-demand price list, July 2026")


_TABLE = (
    InstanceType("p5.4xlarge", 16, 256, 100, 1, 1, H100, 1, capacity_blocks=True),
    InstanceType("p5.48xlarge", 192, 2048, 3200, 32, 32, H100, 8, capacity_blocks=True, price=_price(55.04)),
    InstanceType("p5en.48xlarge", 192, 2048, 3200, 16, 16, H200, 8, capacity_blocks=True, price=_price(63.30)),
    InstanceType("p6-b200.48xlarge", 192, 2048, 3200, 8, 8, B200, 8, capacity_blocks=True, price=_price(113.93)),
    InstanceType("g6e.12xlarge", 48, 384, 100, 1, 1, L40S, 4),
    InstanceType("g6e.48xlarge", 192, 1536, 400, 4, 4, L40S, 8, price=_price(30.13)),
    InstanceType("trn1.32xlarge", 128, 512, 800, 8, 8, TRAINIUM, 16, capacity_blocks=True, price=_price(21.50)),
    InstanceType("trn2.48xlarge", 192, 2048, 3200, 16, 16, TRAINIUM2, 16, capacity_blocks=True),
    InstanceType("inf2.24xlarge", 96, 384, 50, 1, 0, INFERENTIA2, 6),
    InstanceType("inf2.48xlarge", 192, 768, 100, 1, 0, INFERENTIA2, 12, price=_price(12.98)),
    InstanceType("r7i.8xlarge", 32, 256, 12.5, price=_price(2.12)),
    InstanceType("r7i.16xlarge", 64, 512, 25),
    InstanceType("r7i.24xlarge", 96, 768, 37.5),
    InstanceType("r7i.48xlarge", 192, 1536, 50, 1, 1),
    InstanceType("r8i.48xlarge", 192, 1536, 75, 1, 1),
    InstanceType("m7i.2xlarge", 8, 32, 12.5),
    InstanceType("m7i.4xlarge", 16, 64, 12.5),
)

INSTANCE_TYPES = MappingProxyType({row.name: row for row in _TABLE})
"""By name."""


def instance_type(name: str) -> InstanceType:
    """The row of `name`. Raises ConfigError that lists what there is."""
    found = INSTANCE_TYPES.get(name)
    if found is None:
        close = difflib.get_close_matches(name, INSTANCE_TYPES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{name!r} is not in the hardware table; {hint}known: {', '.join(INSTANCE_TYPES)}")
    return found
