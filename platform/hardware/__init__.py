"""EC2 instance types: what is in them, how their network interfaces are laid out, and what fits on them.

Numbers of a table, and arithmetic on them. Nothing here asks AWS or imports Ray.
"""

from __future__ import annotations

from expertmesh.platform.hardware.efa import Interface, efa_interfaces
from expertmesh.platform.hardware.fit import Fit, ReplicaNeed, fit
from expertmesh.platform.hardware.instance_types import INSTANCE_TYPES, Accelerator, InstanceType, Price, instance_type

__all__ = [
    "INSTANCE_TYPES",
    "Accelerator",
    "Fit",
    "InstanceType",
    "Interface",
    "Price",
    "ReplicaNeed",
    "efa_interfaces",
    "fit",
    "instance_type",
]
