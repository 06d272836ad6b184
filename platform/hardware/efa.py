"""Which network interfaces an instance is started with so that all of its EFA bandwidth can be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertmesh.platform.hardware.instance_types import InstanceType


@dataclass(frozen=True, slots=True)
class Interface:
    """One network interface of a RunInstances request."""

    card: int
    device: int
    kind: Literal["interface", "efa", "efa-only"]
    """`interface` has an IP address and no EFA device, `efa-only` the reverse, `efa` both."""


def efa_interfaces(instance: InstanceType) -> tuple[Interface, ...]:
    """One EFA device a network card, and an IP address on card 0 only; empty where the instance has no EFA.

    With one card, the primary interface is both. With more, card 0 carries a plain interface at device 0 and an
    EFA-only one at device 1, and cards 1 to n-1 an EFA-only one at device 0: this spends one IP address an instance.
    Source: Amazon EC2 user guide, "Maximize network bandwidth on Amazon EC2 instances with multiple network cards";
    not tried on AWS. Raises nothing.
    """
    if instance.efa == 0:
        return ()
    if instance.network_cards == 1:
        return (Interface(0, 0, "efa"),)
    others = (Interface(card, 0, "efa-only") for card in range(1, instance.network_cards))
    return (Interface(0, 0, "interface"), Interface(0, 1, "efa-only"), *others)
