"""Moves carried out over members that obey when the test says so."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.deployments.controller.controller import initial_slots
from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.planner import planning_slots
from expertmesh.deployments.controller.replacement import Replacement, State
from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport
from expertmesh.routing.placement import Limits, Move, RoutingTable, Target, plan
from expertmesh.routing.placement.static import IntArray

LAYERS, EXPERTS, SHARDS, REDUNDANCY = (1, 3), 8, 4, 1


class Mesh:
    """A controller's state machines over shards and attention replicas that report when asked."""

    def __init__(self, slots: IntArray, spare: int = 1) -> None:
        self.members = Membership(
            LAYERS, EXPERTS, slots, 1e9, lambda: 0.0, redundancy=REDUNDANCY, spare=spare, staging=True
        )
        self.replacement = Replacement(self.members, REDUNDANCY)
        self.held: dict[str, IntArray] = {}
        self.orders: dict[str, IntArray] = {}
        self.tables: dict[str, RoutingTable] = {}
        for shard in range(len(slots)):
            self.join(f"s{shard}")
        for replica in ("a", "b"):
            self.follow(replica)

    def join(self, shard: str) -> None:
        lease = self.members.join(JoinRequest(shard, "node"))
        assert lease is not None
        self.held[shard] = lease.slots
        self.beat(shard)

    def beat(self, shard: str, failed: IntArray | None = None) -> None:
        target = Target(shard, "node", (f"unix:@{shard}",))
        report = ShardReport(shard, target, self.held[shard].copy(), failed, "no such tensor")
        assert self.members.heartbeat(report)
        self.replacement.advance()
        orders = self.members.orders(shard)
        self.orders.pop(shard, None)
        if orders.slots is not None:
            self.orders[shard] = orders.slots

    def obey(self, shard: str) -> None:
        """Does what it was last told."""
        if shard in self.orders:
            self.held[shard] = self.orders.pop(shard)
        self.beat(shard)

    def follow(self, replica: str) -> None:
        """An attention replica takes the newest table."""
        table = self.tables[replica] = self.members.table()
        self.members.report(AttentionReport(replica, "node", True, table.epoch, 0, None))
        self.replacement.advance()

    def kill(self, shard: str) -> None:
        self.members.leave(shard)
        self.held.pop(shard)
        self.orders.pop(shard, None)
        self.replacement.advance()

    def settle(self) -> None:
        """Everybody reports until nothing is left to do."""
        for _ in range(100):
            if not self.replacement.busy:
                break
            for shard in list(self.held):
                self.obey(shard)
            for replica in self.tables:
                self.follow(replica)
        assert not self.replacement.busy
        for shard in list(self.held):
            self.obey(shard)

    def check(self) -> None:
        """No table that a replica goes by names a copy that its shard does not hold; none is short of copies."""
        for table in [*self.tables.values(), self.members.table()]:
            for layer, expert in np.ndindex(*table.copies.shape[:2]):
                targets = [table.targets[t].shard for t in table.copies[layer, expert].tolist() if t >= 0]
                assert len(set(targets)) == len(targets)
                for shard in targets:
                    if shard in self.held:
                        assert expert in self.held[shard][layer], (shard, layer, expert)


def start(spare: int = 1) -> IntArray:
    return initial_slots(len(LAYERS), EXPERTS, SHARDS, REDUNDANCY, spare, staging=True)


def without_staging(slots: IntArray) -> IntArray:
    return planning_slots(slots, slots.shape[2] - 1, staging=True)


def planned(slots: IntArray, seed: int, steps: int = 3) -> list[Move]:
    loads = np.random.default_rng(seed).lognormal(0, 1.5, (len(LAYERS), EXPERTS))
    everyone = np.ones(SHARDS, dtype=bool)
    return plan(
        without_staging(slots),
        loads,
        redundancy=REDUNDANCY,
        rates=np.ones(SHARDS),
        ready=everyone,
        limits=Limits(steps, least_gain=0.001),
    )


def expected(slots: IntArray, moves: list[Move]) -> list[list[set[int]]]:
    held = [[set(row) - {-1} for row in shard] for shard in slots.tolist()]
    for move in moves:
        held[move.shard][move.layer] -= {move.dropped}
        held[move.shard][move.layer] |= {move.added}
    return held


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), spare=st.integers(0, 2))
def test_a_plan_is_carried_out_and_no_expert_is_short_of_copies_on_the_way(seed: int, spare: int) -> None:
    slots = start(spare)
    mesh = Mesh(slots, spare)
    moves = planned(slots, seed)
    mesh.replacement.start(moves)
    rng = random.Random(seed)
    epoch = mesh.members.epoch
    for _ in range(400):
        if not mesh.replacement.busy:
            break
        actions = [lambda s=shard: mesh.obey(s) for shard in mesh.held]
        actions += [lambda r=replica: mesh.follow(r) for replica in mesh.tables]
        rng.choice(actions)()
        mesh.check()
        assert mesh.members.table().redundancy >= REDUNDANCY
        assert mesh.members.epoch >= epoch
        epoch = mesh.members.epoch
    assert not mesh.replacement.busy
    mesh.settle()
    assert [[set(row) - {-1} for row in shard] for shard in mesh.members.slots.tolist()] == expected(slots, moves)
    assert (mesh.members.slots == -1).any(axis=2).all(), "every shard has its staging slot back"
    assert all(running.state is State.DONE for running in mesh.replacement.ended)


def test_a_copy_is_dropped_only_when_every_replica_goes_by_the_newer_table() -> None:
    slots = start()
    mesh = Mesh(slots)
    expert = int(slots[0, 0, 0])
    other = next(s for s in range(SHARDS) if expert not in slots[s, 0])
    copies = [s for s in range(SHARDS) if expert in slots[s, 0]]
    victim = next(e for e in slots[other, 0].tolist() if sum(e in slots[s, 0] for s in range(SHARDS)) > 1)
    slot = without_staging(slots)[other, 0].tolist().index(victim)
    mesh.replacement.start([Move(0, 0, other, slot, victim, expert, 0.5, 0.6)])
    assert mesh.members.copies(0, expert) == len(copies)
    mesh.beat(f"s{other}")
    mesh.obey(f"s{other}")
    assert mesh.members.copies(0, expert) == len(copies) + 1
    mesh.follow("a")
    assert mesh.replacement.running[0].state is State.DRAINING
    assert victim in mesh.members.slots[other, 0]
    mesh.follow("b")
    assert victim not in mesh.members.slots[other, 0]
    mesh.beat(f"s{other}")
    assert mesh.replacement.running[0].state is State.EMPTYING
    mesh.obey(f"s{other}")
    assert mesh.replacement.ended[-1].state is State.DONE
    assert mesh.replacement.counts == {State.DONE: 1, State.ABANDONED: 0}


def test_a_shard_that_cannot_load_is_left_out_and_the_plan_continues() -> None:
    slots = start()
    mesh = Mesh(slots)
    moves = next(m for m in (planned(slots, seed) for seed in range(50)) if len({x.shard for x in m}) > 2)
    broken = moves[0].shard
    mesh.replacement.start(moves)
    for _ in range(100):
        if not mesh.replacement.busy:
            break
        for shard in list(mesh.held):
            if shard == f"s{broken}" and shard in mesh.orders:
                orders = mesh.orders.pop(shard)
                if (orders[mesh.held[shard] != orders] >= 0).any():
                    mesh.beat(shard, failed=orders)
                    continue
                mesh.held[shard] = orders
            mesh.obey(shard)
        for replica in mesh.tables:
            mesh.follow(replica)
        mesh.check()
        assert mesh.members.table().redundancy >= REDUNDANCY
    assert not mesh.replacement.busy
    ended = {running.move: running for running in mesh.replacement.ended}
    assert ended[moves[0]].state is State.ABANDONED
    assert "no such tensor" in ended[moves[0]].why
    assert any(running.state is State.DONE for running in mesh.replacement.ended)
    assert mesh.replacement.counts == Counter(running.state for running in mesh.replacement.ended)
    assert (mesh.members.slots == -1).any(axis=2).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shards_die_and_are_replaced_in_the_middle(seed: int) -> None:
    slots = start()
    mesh = Mesh(slots)
    mesh.replacement.start(planned(slots, seed))
    rng = random.Random(seed)
    for turn in range(60):
        if turn in (3, 9):
            victim = rng.choice(sorted(mesh.held))
            mesh.kill(victim)
            mesh.check()
            mesh.join(f"{victim}x")
        rng.choice(
            [*(lambda s=s: mesh.obey(s) for s in mesh.held), *(lambda r=r: mesh.follow(r) for r in mesh.tables)]
        )()
        mesh.check()
    mesh.settle()
    assert mesh.members.table().missing == 0
    assert (mesh.members.slots == -1).any(axis=2).all()


def test_one_plan_at_a_time() -> None:
    slots = start()
    mesh = Mesh(slots)
    moves = next(m for m in (planned(slots, seed) for seed in range(50)) if m)
    mesh.replacement.start(moves)
    with pytest.raises(ValueError, match="another plan"):
        mesh.replacement.start(moves)


def test_a_controller_that_comes_back_takes_over_what_shards_hold() -> None:
    slots = start()
    mesh = Mesh(slots)
    mesh.replacement.start(next(m for m in (planned(slots, seed) for seed in range(50)) if m))
    mesh.settle()
    held = mesh.members.slots.copy()
    back = Membership(LAYERS, EXPERTS, slots, 1e9, lambda: 0.0, redundancy=REDUNDANCY, spare=1, staging=True)
    for index in range(SHARDS):
        lease = back.join(JoinRequest(f"s{index}", "node", index, held[index], mesh.members.epoch))
        assert lease is not None
        assert np.array_equal(lease.slots, held[index])
    assert back.epoch > mesh.members.epoch
