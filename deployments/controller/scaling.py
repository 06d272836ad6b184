"""How many replicas there are to be: what people ask for, else what the signals say. The rules are pure functions."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from expertmesh.deployments.controller.membership import Membership
from expertmesh.platform.autoscaling.rules import (
    AttentionAims,
    AttentionSignals,
    Bounds,
    Memory,
    ShardAims,
    ShardSignals,
    attention_parts,
    decided,
    experts_parts,
)
from expertmesh.platform.autoscaling.targets import DEPLOYMENTS, Deployment, Targets
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.config.sections import AttentionAutoscaling, ExpertsAutoscaling

log = logging.getLogger("expertmesh.controller")

Request = int | str | None
"""A number of replicas, `auto` for what the signals or the configuration say, None for no change."""
AUTO = "auto"


class Scaling:
    """Keeps the numbers of both deployments; Serve's controller reads them and adds and removes replicas."""

    def __init__(self, config: MeshConfig, members: Membership, targets: Targets) -> None:
        """Takes up the numbers that a controller before this one has set."""
        self._config = config
        self._members = members
        self._targets = targets
        self._memory: dict[Deployment, Memory] = {"attention": Memory(), "experts": Memory()}
        self._counted: dict[str, tuple[float, float, float]] = {}
        """Time, `busy_s` and `waited_s` of each shard when its signals were last looked at."""
        self.decisions: Counter[tuple[Deployment, str, str]] = Counter()
        """Changes of a number: deployment, `up` or `down`, and the reason: a signal's name, `bounds` or `manual`."""
        self._follow()

    def wanted(self, deployment: Deployment) -> int:
        """How many replicas there are to be."""
        target = self._targets.target(deployment)
        return self._configured(deployment) if target is None else target

    def scale(self, attention: Request, experts: Request) -> dict[str, int | None]:
        """Sets numbers by hand; what is wanted afterwards. Raises ValueError, saying why, and changes nothing then."""
        if attention is not None and attention != AUTO and int(attention) < 1:
            raise ValueError(f"attention: {attention}; allowed: 1 or more, or {AUTO!r}")
        if experts is not None:
            self._check_experts(experts)
        requests: dict[Deployment, Request] = {"attention": attention, "experts": experts}
        for deployment, request in requests.items():
            if request is not None:
                before = self.wanted(deployment)
                self._targets.set_manual(deployment, None if request == AUTO else int(request))
                self._note(deployment, before, self.wanted(deployment), "manual")
        self._follow()
        return self.numbers

    @property
    def numbers(self) -> dict[str, int | None]:
        """What is wanted of each deployment; None where there is none."""
        return {deployment: self.wanted(deployment) if self._has(deployment) else None for deployment in DEPLOYMENTS}

    def decide(self, balancedness: float, now: float) -> None:
        """Looks at the signals of the deployments that follow them; now: seconds on a clock that never goes back."""
        scaling = self._config.autoscaling
        if scaling.attention is not None:
            attention = scaling.attention
            aims = AttentionAims(
                attention.target_ongoing_requests, attention.waiting, attention.kv_use, attention.ttft_ms / 1000
            )
            replicas = [member.report for member in self._members.attention.values() if member.report.ready]
            parts = attention_parts([_attention_signals(r.running, r.stats.get("load", {})) for r in replicas], aims)
            least, most = attention.min_replicas, attention.max_replicas
            self._decide("attention", parts, len(replicas), now, _bounds(least, most, attention))
        if scaling.experts is not None:
            experts = scaling.experts
            parts = experts_parts(
                self._shard_signals(now), balancedness, ShardAims(experts.busy, experts.queueing, experts.balancedness)
            )
            least, most = experts.min_shards, experts.max_shards
            self._decide("experts", parts, len(self._members.present()), now, _bounds(least, most, experts))
        self._follow()

    def _decide(
        self, deployment: Deployment, parts: Mapping[str, float], ready: int, now: float, bounds: Bounds
    ) -> None:
        if self._targets.manual(deployment) is not None:
            self._memory[deployment] = Memory()
            return
        before = self.wanted(deployment)
        reason = max(parts, key=lambda part: parts[part])
        load = parts[reason]
        after, self._memory[deployment] = decided(load, before, ready, now, self._memory[deployment], bounds)
        if after != before:
            if not bounds.least <= before <= bounds.most:
                reason = "bounds"
            log.warning("%s: %d replicas instead of %d, at load %.2f (%s)", deployment, after, before, load, reason)
            self._targets.set_automatic(deployment, after)
            self._note(deployment, before, after, reason)

    def _note(self, deployment: Deployment, before: int, after: int, reason: str) -> None:
        if after != before:
            self.decisions[deployment, "up" if after > before else "down", reason] += 1

    def _shard_signals(self, now: float) -> list[ShardSignals]:
        signals, counted = [], {}
        for member in self._members.present().values():
            busy_s, waited_s = member.stats.get("busy_s", 0.0), member.stats.get("waited_s", 0.0)
            at, busy_before, waited_before = self._counted.get(member.shard, (now, 0.0, 0.0))
            counted[member.shard] = (now, busy_s, waited_s)
            busy = busy_s - busy_before
            if now > at:
                queueing = (waited_s - waited_before) / busy if "waited_s" in member.stats and busy > 0 else None
                signals.append(ShardSignals(busy / (now - at), queueing))
        self._counted = counted
        return signals

    def _check_experts(self, request: int | str) -> None:
        if not self._has("experts"):
            raise ValueError("experts.mode is colocated: there are no expert shards")
        least = self._members.redundancy
        most = self._members.num_experts * least
        if request != AUTO and not least <= int(request) <= most:
            raise ValueError(f"experts: {request}; allowed: {least} (experts.redundancy) to {most}, or {AUTO!r}")

    def _follow(self) -> None:
        self._members.wanted = self.wanted("experts") if self._has("experts") else 0

    def _has(self, deployment: Deployment) -> bool:
        return deployment == "attention" or self._config.experts.mode == "mesh"

    def _configured(self, deployment: Deployment) -> int:
        if deployment == "experts":
            return self._config.experts.shards
        scaling = self._config.autoscaling.attention
        return self._config.attention.replicas if scaling is None else scaling.min_replicas


def _bounds(least: int, most: int, pace: AttentionAutoscaling | ExpertsAutoscaling) -> Bounds:
    return Bounds(least, most, pace.up_after_s, pace.down_after_s, pace.cooldown_s)


def _attention_signals(running: int, load: Mapping[str, Any]) -> AttentionSignals:
    return AttentionSignals(running, load.get("waiting"), load.get("kv_use"), load.get("ttft_s"))
