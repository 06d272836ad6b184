"""How a dispatcher behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from expertmesh.routing.wire import Limits


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """The fields of the config's `routing` section that a dispatcher needs, in seconds."""

    node: str
    """Id of this node: shards on it are reached by unix socket."""
    revision: str
    """Identity of the checkpoint; a shard that serves another one is refused."""
    policy: str = "live_cost"
    transport: str = "auto"
    limits: Limits = field(default_factory=Limits)
    frame_deadline_s: float = 10.0
    hedge_after_s: float = 0.15
    """A frame is not taken to be overdue before, where other copies could answer it."""
    hedge_service_times: float = 8.0
    """It is then, after so many times what frames of its size took lately."""
    connect_timeout_s: float = 5.0
    unavailable_timeout_s: float = 60.0
