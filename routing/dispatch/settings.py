"""How a dispatcher behaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from expertmesh.routing.transport import TlsSettings
from expertmesh.routing.wire import Limits

_SECTIONS: dict[str, type[Any]] = {"limits": Limits, "tls": TlsSettings}


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
    tls: TlsSettings | None = None
    """What connections to other nodes are encrypted with."""

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """From its fields as JSON. Raises TypeError for what are none."""
        sections = {name: kind(**values[name]) for name, kind in _SECTIONS.items() if values.get(name) is not None}
        return cls(**{**values, **sections})
