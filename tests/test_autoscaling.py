"""Rules on recorded signals, numbers that people set, and what Serve's controller is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.deployments.controller.durable import RayKeyValues
from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.policy import TargetPolicy
from expertmesh.deployments.controller.scaling import Scaling
from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport
from expertmesh.platform.autoscaling.rules import (
    AttentionAims,
    AttentionSignals,
    Bounds,
    Memory,
    ShardAims,
    ShardSignals,
    attention_load,
    decided,
    experts_load,
)
from expertmesh.platform.autoscaling.targets import Targets
from expertmesh.platform.config import MeshConfig, load_config
from expertmesh.routing.placement import Target, even_slots
from tests.test_durable import Memory as Store

ATTENTION = AttentionAims(running=8.0, waiting=2.0, kv_use=0.8, ttft_s=2.0)
SHARDS = ShardAims(busy=0.6, queueing=1.0, balancedness=0.8)
BOUNDS = Bounds(least=1, most=8, up_after_s=10.0, down_after_s=100.0, cooldown_s=30.0)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([], 0.0),
        ([AttentionSignals(running=8)], 1.0),
        ([AttentionSignals(4, waiting=0, kv_use=0.2, ttft_s=0.5), AttentionSignals(12, 0, 0.6, 1.5)], 1.0),
        ([AttentionSignals(2, waiting=3, kv_use=0.1, ttft_s=0.1)], 1.5),
        ([AttentionSignals(2, waiting=0, kv_use=0.96, ttft_s=0.1)], 1.2),
        ([AttentionSignals(2, waiting=0, kv_use=0.1, ttft_s=5.0)], 2.5),
    ],
)
def test_attention_is_as_loaded_as_its_scarcest_means(replicas: list[AttentionSignals], expected: float) -> None:
    assert attention_load(replicas, ATTENTION) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shards", "balancedness", "expected"),
    [
        ([], 1.0, 0.0),
        ([ShardSignals(0.6), ShardSignals(0.6)], 1.0, 1.0),
        ([ShardSignals(0.54), ShardSignals(0.54)], 0.9, 1.0),
        ([ShardSignals(0.9), ShardSignals(0.06)], 0.53, 1.0),  # the rest is for re-placement
        ([ShardSignals(0.3, queueing=2.0)], 1.0, 2.0),
    ],
)
def test_shards_are_as_loaded_as_the_busiest_would_be(
    shards: list[ShardSignals], balancedness: float, expected: float
) -> None:
    assert experts_load(shards, balancedness, SHARDS) == pytest.approx(expected)


def played(loads: list[float], work: bool, replicas: int = 2, step_s: float = 5.0) -> list[int]:
    """The numbers over time; loads: recorded, each for `step_s`. work: they are the work of one replica, which more
    share."""
    memory, numbers = Memory(), []
    for turn, load in enumerate(loads):
        now = 1000.0 + turn * step_s
        replicas, memory = decided(load / replicas if work else load, replicas, replicas, now, memory, BOUNDS)
        numbers.append(replicas)
    return numbers


def test_it_grows_after_a_while_and_shrinks_after_a_longer_one() -> None:
    numbers = played([2.0] * 4 + [5.5] * 20 + [1.0] * 60, work=True)
    assert numbers[:6] == [2] * 6, "not at once"
    assert numbers[6] == 4, "at most twice as many"
    assert max(numbers) == 6
    assert numbers[23] == 6
    assert numbers[24 : 24 + 20] == [6] * 20
    assert numbers[24 + 20] == 3
    assert numbers[-1] == 2, "1.0 of work does not fit into 0.8 of one"
    assert numbers == sorted(numbers[:40]) + sorted(numbers[40:], reverse=True)


def test_a_peak_or_a_lull_changes_nothing() -> None:
    assert set(played(([3.0] + [1.0] * 2) * 30, work=False)) == {2}
    assert set(played(([0.0] * 19 + [1.0]) * 10, work=False)) == {2}


def test_loads_around_the_aim_change_nothing() -> None:
    rng = np.random.default_rng(1)
    assert set(played(rng.uniform(0.45, 1.1, 400).tolist(), work=False, replicas=2)) == {2}


def test_nothing_is_concluded_while_replicas_come_or_go() -> None:
    memory = Memory(high_since=0.0)
    assert decided(9.0, 4, 3, 500.0, memory, BOUNDS) == (4, Memory())


def test_the_bounds_hold_at_once() -> None:
    assert decided(1.0, 12, 12, 5.0, Memory(), BOUNDS) == (8, Memory(changed_at=5.0))
    low = Bounds(3, 8, 10.0, 100.0, 30.0)
    assert decided(0.0, 1, 0, 5.0, Memory(), low) == (3, Memory(changed_at=5.0))


@given(
    loads=st.lists(st.floats(0, 50), min_size=1, max_size=60),
    replicas=st.integers(1, 8),
)
def test_whatever_the_signals_say(loads: list[float], replicas: int) -> None:
    memory, changed = Memory(), float("-inf")
    for turn, load in enumerate(loads):
        now = 7.0 * turn
        before, (replicas, memory) = replicas, decided(load, replicas, replicas, now, memory, BOUNDS)
        assert BOUNDS.least <= replicas <= BOUNDS.most
        assert before / 2 <= replicas <= 2 * before
        if replicas != before:
            assert now - changed >= BOUNDS.cooldown_s
            changed = now


class Mesh:
    """The controller's part of scaling, without Ray."""

    def __init__(self, store: Store | None = None, **settings: Any) -> None:
        self.config: MeshConfig = load_config({"model": "demo", **settings})
        self.members = Membership((0,), 8, even_slots(1, 8, 2, 1), 1e9, lambda: 0.0)
        self.targets = Targets(store or Store(), "app")
        self.scaling = Scaling(self.config, self.members, self.targets)

    def report(self, replica: str, running: int, **load: float) -> None:
        stats = {"load": load} if load else {}
        self.members.report(AttentionReport(replica, "node", True, 0, running, None, stats))

    def beat(self, shard: str, busy_s: float) -> None:
        lease = self.members.join(JoinRequest(shard, "node"))
        assert lease is not None
        target = Target(shard, "node", ("unix:@x",))
        self.members.heartbeat(ShardReport(shard, target, lease.slots, stats={"busy_s": busy_s}))


def test_numbers_by_hand() -> None:
    mesh = Mesh()
    assert mesh.scaling.numbers == {"attention": 1, "experts": 2}
    assert mesh.scaling.scale(None, 4) == {"attention": 1, "experts": 4}
    assert mesh.members.wanted == 4
    assert mesh.scaling.scale(3, None) == {"attention": 3, "experts": 4}
    assert mesh.scaling.scale("auto", "auto") == {"attention": 1, "experts": 2}
    assert mesh.members.wanted == 2


def test_numbers_outlive_the_controller_but_not_the_application() -> None:
    store = Store()
    Mesh(store).scaling.scale(2, 3)
    again = Mesh(store)
    assert again.scaling.numbers == {"attention": 2, "experts": 3}
    assert again.members.wanted == 3
    again.targets.clear()
    assert Mesh(store).scaling.numbers == {"attention": 1, "experts": 2}


@pytest.mark.parametrize(
    ("attention", "experts", "message"),
    [
        (0, None, "attention: 0; allowed: 1 or more"),
        (None, 9, "experts: 9; allowed: 1 .* to 8"),
        (None, 0, "experts: 0"),
    ],
)
def test_numbers_that_cannot_be(attention: int | None, experts: int | None, message: str) -> None:
    mesh = Mesh()
    with pytest.raises(ValueError, match=message):
        mesh.scaling.scale(attention, experts)
    assert mesh.scaling.numbers == {"attention": 1, "experts": 2}


def test_without_shards_there_is_nothing_to_scale() -> None:
    mesh = Mesh(experts={"mode": "colocated"})
    assert mesh.scaling.numbers == {"attention": 1, "experts": None}
    with pytest.raises(ValueError, match="colocated"):
        mesh.scaling.scale(None, 2)


def test_attention_follows_its_signals_unless_a_person_has_spoken() -> None:
    mesh = Mesh(autoscaling={"attention": {"min_replicas": 1, "max_replicas": 4, "cooldown_s": 1.0}})
    for now in (0.0, 5.0, 10.0):
        mesh.report("a", running=2, kv_use=0.99, waiting=5)
        mesh.scaling.decide(1.0, now)
    assert mesh.scaling.wanted("attention") == 2
    mesh.scaling.scale(1, None)
    for now in (20.0, 40.0):
        mesh.scaling.decide(1.0, now)
    assert mesh.scaling.wanted("attention") == 1
    mesh.scaling.scale("auto", None)
    assert mesh.scaling.wanted("attention") == 2
    assert mesh.scaling.decisions == {
        ("attention", "up", "waiting"): 1,
        ("attention", "down", "manual"): 1,
        ("attention", "up", "manual"): 1,
    }


def test_shards_follow_how_busy_they_are() -> None:
    mesh = Mesh(autoscaling={"experts": {"min_shards": 2, "max_shards": 4}})
    for turn in range(8):
        mesh.beat("s0", 5.0 * 0.9 * turn)
        mesh.beat("s1", 5.0 * 0.9 * turn)
        mesh.scaling.decide(1.0, 5.0 * turn)
    assert mesh.scaling.wanted("experts") == 3
    assert mesh.members.wanted == 3
    assert mesh.scaling.decisions == {("experts", "up", "busy"): 1}


def test_a_number_out_of_bounds_is_brought_back_for_that_reason() -> None:
    mesh = Mesh(autoscaling={"experts": {"min_shards": 3, "max_shards": 4}})
    mesh.scaling.decide(1.0, 0.0)
    assert mesh.scaling.wanted("experts") == 3
    assert mesh.scaling.decisions == {("experts", "up", "bounds"): 1}


def test_serve_keeps_what_it_has_where_the_number_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether Ray runs in this process depends on the tests before: its store is made to fail."""

    def away(self: RayKeyValues, key: str) -> bytes | None:
        raise ConnectionError("the head is away")

    monkeypatch.setattr(RayKeyValues, "get", away)
    context = SimpleNamespace(app_name="app", target_num_replicas=5)
    assert TargetPolicy("experts", 2)(cast("Any", context)) == (5, {})
