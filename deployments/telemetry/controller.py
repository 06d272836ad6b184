"""What the controller records: health, placement, members, scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.replacement import Replacement
from expertmesh.deployments.controller.scaling import Scaling
from expertmesh.deployments.controller.takeover import Takeover
from expertmesh.deployments.telemetry.recorder import Recorder
from expertmesh.platform.metrics import catalogue as series


@dataclass(frozen=True, slots=True)
class Figures:
    """What the controller keeps beside its parts."""

    healthy: bool
    missing: int
    """Logical experts that no shard serves."""
    balancedness: float
    frozen: bool


class ControllerMetrics:
    """Records for the controller. Used by one thread."""

    def __init__(
        self,
        recorder: Recorder,
        members: Membership,
        replacement: Replacement,
        takeover: Takeover,
        scaling: Scaling,
    ) -> None:
        self._recorder = recorder
        self._members, self._replacement, self._takeover, self._scaling = members, replacement, takeover, scaling

    def publish(self, figures: Figures) -> None:
        """Sets the gauges, and counts on to what the parts count."""
        record = self._recorder
        record.set(series.HEALTHY, figures.healthy)
        record.set(series.EPOCH, self._members.epoch)
        record.set(series.MISSING, figures.missing)
        record.set(series.UNPLACED, len(self._takeover.unplaced))
        record.set(series.BALANCEDNESS, figures.balancedness)
        record.set(series.FROZEN, figures.frozen)
        record.set(series.MOVES_RUNNING, len(self._replacement.running))
        for outcome, moves in self._replacement.counts.items():
            record.count_to(series.MOVES, moves, outcome=outcome)
        record.count_to(series.ADOPTED, self._takeover.adopted)
        for side, states in self._states().items():
            for state, number in states.items():
                record.set(series.MEMBERS, number, side=side, state=state)
            record.set(series.WANTED, self._scaling.numbers[side] or 0, side=side)
            record.count_to(series.LOST, self._members.lost[side], side=side)
        for (side, direction, reason), decisions in self._scaling.decisions.items():
            record.count_to(series.SCALING, decisions, side=side, direction=direction, reason=reason)

    def _states(self) -> Mapping[str, Mapping[str, int]]:
        shards, replicas = self._members.shards.values(), self._members.attention.values()
        ready, leaving = sum(replica.report.ready for replica in replicas), sum(shard.leaving for shard in shards)
        serving = sum(shard.target is not None and not shard.leaving for shard in shards)
        return {
            "attention": {"ready": ready, "starting": len(replicas) - ready, "leaving": 0},
            "experts": {"ready": serving, "starting": len(shards) - serving - leaving, "leaving": leaving},
        }
