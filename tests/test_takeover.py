"""Shards that die, leave and come over a controller's state machines, which report when the test says so."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.deployments.controller.controller import initial_slots
from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.replacement import Replacement
from expertmesh.deployments.controller.takeover import Takeover
from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport
from expertmesh.routing.placement import RoutingTable, Target, share
from expertmesh.routing.placement.static import IntArray

LAYERS, EXPERTS = (1, 3), 12


class Mesh:
    """A controller over shards and attention replicas."""

    def __init__(
        self, shards: int, redundancy: int = 1, most: int | None = None, staging: bool = True, spare: int = 0
    ) -> None:
        slots = initial_slots(len(LAYERS), EXPERTS, shards, redundancy, spare, staging)
        self.now = 0.0
        self.members = Membership(
            LAYERS,
            EXPERTS,
            slots,
            5.0,
            lambda: self.now,
            redundancy=redundancy,
            spare=spare,
            staging=staging,
            suspect_s=2.0,
        )
        self.replacement = Replacement(self.members, redundancy)
        self.takeover = Takeover(self.members, self.replacement, most)
        self.held: dict[str, IntArray] = {}
        self.orders: dict[str, IntArray] = {}
        self.released: set[str] = set()
        self.tables: dict[str, RoutingTable] = {}
        self.silent: dict[str, int] = {}
        """Indices that they had."""
        self._named = 0

    def follow_up(self) -> None:
        self.takeover.advance()
        self.replacement.advance()

    def come(self, count: int = 1) -> list[str]:
        """New processes join, as far as they are wanted."""
        joined = []
        for _ in range(count):
            self._named += 1
            shard = f"s{self._named}"
            lease = self.members.join(JoinRequest(shard, "node"))
            if lease is not None:
                self.held[shard] = np.full_like(lease.slots, -1)
                self.orders[shard] = lease.slots
                joined.append(shard)
        return joined

    def start(self) -> None:
        for replica in ("a", "b"):
            self.follow(replica)
        self.come(len(self.members.slots))
        self.settle()

    def beat(self, shard: str, failure: str = "") -> None:
        held = self.held[shard]
        target = Target(shard, "node", (f"unix:@{shard}",)) if (held >= 0).any() else None
        failed = self.orders.get(shard) if failure else None
        report = ShardReport(shard, target, held.copy(), failed, failure)
        assert self.members.heartbeat(report)
        self.follow_up()
        orders = self.members.orders(shard)
        self.orders.pop(shard, None)
        if orders.slots is not None:
            self.orders[shard] = orders.slots
        if orders.released:
            self.released.add(shard)

    def obey(self, shard: str, layers: slice = slice(None)) -> None:
        """Does what it was last told, in some layers: it may be told something else before it has done all."""
        if (orders := self.orders.get(shard)) is not None:
            width = max(orders.shape[1], self.held[shard].shape[1])
            held, wanted = (
                np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-1) for a in (self.held[shard], orders)
            )
            held[held != wanted] = -1
            held[layers] = wanted[layers]
            self.held[shard] = held
            if np.array_equal(held, wanted):
                del self.orders[shard]
        self.beat(shard)

    def follow(self, replica: str) -> None:
        table = self.tables[replica] = self.members.table()
        self.members.report(AttentionReport(replica, "node", True, table.epoch, 0, None))
        self.follow_up()

    def die(self, shard: str) -> None:
        """It is not heard of any more."""
        del self.held[shard]
        self.orders.pop(shard, None)
        self.members.leave(shard)
        self.follow_up()

    def fall_silent(self, shard: str) -> None:
        """It lives, and is not heard of for so long that it loses its lease."""
        self.silent[shard] = self.members.shards[shard].index
        self.orders.pop(shard, None)
        self.now += 6.0
        for member in (*self.members.shards.values(), *self.members.attention.values()):
            member.seen = self.now
        self.members.shards[shard].seen -= 6.0
        assert self.members.expire() == [shard]
        self.follow_up()

    def come_back(self, shard: str) -> None:
        """It is heard of again; if its experts went to another it ends."""
        index, held = self.silent.pop(shard), self.held[shard].copy()
        if self.members.join(JoinRequest(shard, "node", index, held, self.members.epoch)) is None:
            del self.held[shard]

    def depart(self, shard: str) -> None:
        """It is told to stop."""
        self.members.leaving(shard)
        self.follow_up()

    def go(self) -> None:
        """Those that were released end."""
        for shard in self.released & set(self.held):
            self.die(shard)

    def settle(self) -> None:
        """Everybody reports until nothing is left to do."""
        idle = 0
        for _ in range(200):
            before = (self.members.epoch, self.members.slots.tobytes(), set(self.held))
            for shard in list(self.held):
                self.obey(shard)
            for replica in self.tables:
                self.follow(replica)
            self.go()
            same = before == (self.members.epoch, self.members.slots.tobytes(), set(self.held))
            idle = idle + 1 if same and not self.orders and not self.replacement.busy else 0
            if idle == 2:
                return
        raise AssertionError("it does not settle")

    def check(self) -> None:
        """No shard is to hold an expert twice; tables name only what living shards hold."""
        for row in self.members.slots.reshape(-1, self.members.slots.shape[2]).tolist():
            held = [expert for expert in row if expert >= 0]
            assert len(set(held)) == len(held)
        for table in [*self.tables.values(), self.members.table()]:
            for layer, expert in np.ndindex(*table.copies.shape[:2]):
                targets = [table.targets[t].shard for t in table.copies[layer, expert].tolist() if t >= 0]
                assert len(set(targets)) == len(targets)
                assert all(expert in self.held[shard][layer] for shard in targets if shard in self.held)

    def check_settled(self) -> None:
        """Every expert is where it is to be, no shard has more than its share, and each has its staging slot."""
        self.check()
        present = self.members.present()
        redundancy = min(self.members.redundancy, len(present))
        assert self.members.table().redundancy >= redundancy
        assert self.takeover.settled
        usual = share(EXPERTS, len(present), self.members.redundancy, self.members.spare)
        for index in present:
            counts = (self.members.slots[index] >= 0).sum(axis=1)
            assert (counts >= usual).all() or not self.members.spare
            assert (counts < usual + redundancy).all(), "one more where all others with room have the expert"
            assert (self.members.slots[index] == -1).any(axis=1).all() or not self.members.staging


@pytest.mark.parametrize("redundancy", [1, 2])
def test_survivors_take_over_at_once_and_give_up_when_a_replacement_serves(redundancy: int) -> None:
    mesh = Mesh(4, redundancy)
    mesh.start()
    mesh.check_settled()
    before = mesh.members.table()
    assert before.redundancy == redundancy
    victim = next(iter(mesh.held))
    lost = int((mesh.held[victim] >= 0).sum())
    assert mesh.takeover.adopted == 0
    mesh.die(victim)
    assert mesh.takeover.adopted == lost
    assert mesh.members.table().redundancy == redundancy - 1
    assert not mesh.takeover.settled
    for shard in mesh.held:
        mesh.beat(shard)
    assert sum(orders is not None for orders in mesh.orders.values()) == 3, "the work is spread"
    mesh.settle()
    mesh.check_settled()
    assert mesh.members.table().redundancy == redundancy
    (new,) = mesh.come()
    mesh.settle()
    mesh.check_settled()
    assert (mesh.held[new] >= 0).any(axis=1).all()
    assert {m.index for m in mesh.members.shards.values()} == {0, 1, 2, 3}


def test_a_replacement_that_comes_first_gets_what_the_dead_one_had() -> None:
    mesh = Mesh(2, 2)
    mesh.start()
    victim, survivor = mesh.held
    index = mesh.members.shards[victim].index
    lost = mesh.members.slots[index].copy()
    mesh.die(victim)
    (new,) = mesh.come()
    assert np.array_equal(np.sort(mesh.orders[new]), np.sort(lost[:, : mesh.orders[new].shape[1]]))
    assert survivor not in mesh.orders, "it has all there is"
    mesh.settle()
    mesh.check_settled()


def test_nobody_takes_over_what_has_not_been_served_yet() -> None:
    mesh = Mesh(3)
    first, second, third = mesh.come(3)
    mesh.obey(first)
    assert mesh.members.table().missing > 0
    assert first not in mesh.orders
    mesh.die(second)  # it could not load
    mesh.beat(first)
    assert first not in mesh.orders
    mesh.come()
    mesh.settle()
    mesh.check_settled()
    assert third in mesh.held


def test_a_hot_expert_is_taken_over_first_and_by_the_idlest() -> None:
    mesh = Mesh(3)
    mesh.start()
    loads = np.ones((2, EXPERTS), dtype=np.int64)
    victim, busy, idle = mesh.held
    held = {s: set(mesh.held[s][0].tolist()) - {-1} for s in mesh.held}
    hot = min(held[victim])
    loads[0, list(held[busy])] = 1000
    loads[0, hot] = 500
    mesh.members.report(AttentionReport("a", "node", True, mesh.members.epoch, 0, loads))
    mesh.die(victim)
    assert hot in mesh.members.slots[mesh.members.shards[idle].index, 0]


def test_a_shard_without_room_is_passed_over() -> None:
    mesh = Mesh(3)
    mesh.start()
    victim, full, roomy = mesh.held
    mesh.die(victim)
    mesh.beat(full)
    mesh.beat(full, failure="MemoryError: no room")
    mesh.settle()
    assert mesh.members.table().missing == 0
    assert np.array_equal((mesh.held[full] >= 0).sum(axis=1), [4, 4])
    assert np.array_equal((mesh.held[roomy] >= 0).sum(axis=1), [8, 8])


def test_beyond_the_limit_nothing_is_taken_over() -> None:
    mesh = Mesh(3, most=5)
    mesh.start()
    mesh.die(next(iter(mesh.held)))
    mesh.settle()
    assert mesh.members.table().missing == 2 * (4 - 2)
    assert len(mesh.takeover.unplaced) == 4
    assert not mesh.takeover.settled
    mesh.come()
    mesh.settle()
    mesh.check_settled()


@pytest.mark.parametrize("redundancy", [1, 2])
def test_more_shards_share_the_experts_and_no_copy_is_missed_on_the_way(redundancy: int) -> None:
    mesh = Mesh(2, redundancy)
    mesh.start()
    mesh.members.wanted = 4
    joined = mesh.come(3)
    assert len(joined) == 2, "no more than wanted"
    part = slice(0, 1)
    mesh.obey(joined[0], part)
    assert joined[0] in {t.shard for t in mesh.members.table().targets}, "it serves the first layers already"
    for _ in range(20):
        for shard in list(mesh.held):
            mesh.obey(shard, random.Random(3).choice([part, slice(None)]))
            assert mesh.members.table().redundancy >= redundancy
            mesh.check()
        mesh.follow("a")
        mesh.follow("b")
    mesh.settle()
    mesh.check_settled()
    assert {tuple((h >= 0).sum(axis=1)) for h in mesh.held.values()} == {(3 * redundancy,) * 2}


def test_a_shard_that_leaves_serves_until_the_others_have_its_experts() -> None:
    mesh = Mesh(3)
    mesh.start()
    first, second, gone = mesh.held
    mesh.members.wanted = 2
    mesh.depart(gone)
    for shard in mesh.held:
        mesh.beat(shard)
    assert gone not in mesh.released
    mesh.obey(first)
    mesh.obey(second)
    assert mesh.members.table().missing == 0
    mesh.beat(gone)
    assert gone not in {t.shard for t in mesh.members.table().targets}
    assert gone not in mesh.released, "replicas still go by a table with it"
    mesh.follow("a")
    mesh.beat(gone)
    assert gone not in mesh.released
    mesh.follow("b")
    mesh.beat(gone)
    assert gone in mesh.released
    mesh.go()
    mesh.settle()
    mesh.check_settled()
    assert mesh.come() == [], "it is not replaced"


def test_when_all_leave_nobody_waits() -> None:
    mesh = Mesh(2)
    mesh.start()
    for shard in mesh.held:
        mesh.depart(shard)
    for shard in mesh.held:
        mesh.beat(shard)
    assert mesh.released == set(mesh.held)


def test_one_that_leaves_is_replaced_before_it_goes() -> None:
    mesh = Mesh(2)
    mesh.start()
    gone = next(iter(mesh.held))
    mesh.depart(gone)
    assert len(mesh.come()) == 1
    mesh.settle()
    mesh.check_settled()
    assert gone not in mesh.held
    assert len(mesh.held) == 2


def test_a_controller_that_comes_back_takes_over_what_nobody_resumes() -> None:
    mesh = Mesh(3)
    mesh.start()
    lost, *alive = mesh.held
    seen = mesh.members.epoch
    back = Mesh(3)
    for shard in alive:
        index = mesh.members.shards[shard].index
        assert back.members.join(JoinRequest(shard, "node", index, mesh.held[shard], seen)) is not None
        back.held[shard] = mesh.held[shard]
        back.beat(shard)
    back.settle()
    assert back.members.table().missing > 0, "it may be that it only takes longer"
    back.members.give_up_starting()
    back.follow_up()
    back.settle()
    back.check_settled()
    assert lost not in back.held


def test_a_controller_that_comes_back_knows_shards_beyond_the_configured_ones() -> None:
    mesh = Mesh(2)
    mesh.start()
    mesh.members.wanted = 4
    mesh.come(2)
    mesh.settle()
    back = Mesh(2)
    for shard, member in mesh.members.shards.items():
        lease = back.members.join(JoinRequest(shard, "node", member.index, mesh.held[shard], mesh.members.epoch))
        assert lease is not None
        assert lease.index == member.index
        back.held[shard] = mesh.held[shard]
        back.beat(shard)
    assert back.members.table().missing == 0
    back.settle()
    back.check_settled()
    assert back.members.join(JoinRequest("x", "node", 10**6, mesh.held[shard], 0)) is None


def test_a_controller_that_inherits_a_placement_waits_for_nobody_that_is_not_in_it() -> None:
    mesh = Mesh(3)
    mesh.start()
    gone = next(iter(mesh.held))
    mesh.members.wanted = 2
    mesh.depart(gone)
    mesh.settle()
    slots = mesh.members.slots
    assert (slots == -1).all(axis=(1, 2)).sum() == 1, "a retired index"
    assert Membership(LAYERS, EXPERTS, slots, 5.0, lambda: 0.0).starting == {1, 2}


def test_a_shard_whose_connections_broke_is_dropped_after_two_heartbeats() -> None:
    mesh = Mesh(3)
    mesh.start()
    victim, other, third = mesh.held
    mesh.members.report(AttentionReport("a", "node", True, mesh.members.epoch, 0, None, {"down": [victim, other]}))
    mesh.now += 1.5
    mesh.beat(other)
    assert mesh.members.expire() == []
    mesh.now += 0.6
    assert mesh.members.expire() == [victim]
    assert third in mesh.members.shards


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 100_000),
    shards=st.integers(2, 4),
    redundancy=st.integers(1, 2),
    staging=st.booleans(),
    deaths=st.booleans(),
)
def test_whatever_happens_it_ends_well(seed: int, shards: int, redundancy: int, staging: bool, deaths: bool) -> None:
    mesh = Mesh(shards, redundancy, staging=staging)
    mesh.start()
    rng = random.Random(seed)
    for _ in range(60):
        event = rng.random()
        staying = [s for s, m in mesh.members.shards.items() if not m.leaving]
        if event < 0.04:
            mesh.members.wanted = rng.randint(redundancy, 5)
        elif event < 0.12:
            mesh.come()
        elif event < 0.16 and len(staying) > redundancy:
            mesh.depart(rng.choice(staying))
        elif event < 0.20 and deaths and len(mesh.held) > 1:
            mesh.die(rng.choice(list(mesh.held)))
        elif event < 0.35:
            mesh.follow(rng.choice(["a", "b"]))
        elif event < 0.4:
            mesh.go()
        elif mesh.held:
            mesh.obey(rng.choice(list(mesh.held)), rng.choice([slice(0, 1), slice(1, 2), slice(None)]))
        mesh.check()
        if not deaths:
            assert mesh.members.table().redundancy >= redundancy, "nothing was lost, so nothing may be missed"
    mesh.settle()
    while len(mesh.members.shards) < redundancy:
        mesh.members.wanted = max(mesh.members.wanted, redundancy)
        mesh.come()
    mesh.settle()
    mesh.check_settled()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 100_000), staging=st.booleans(), spare=st.integers(0, 2))
def test_shards_that_are_late_from_the_first_start_on_get_their_experts_in_the_end(
    seed: int, staging: bool, spare: int
) -> None:
    mesh = Mesh(4, staging=staging, spare=spare)
    for replica in ("a", "b"):
        mesh.follow(replica)
    mesh.come(4)
    rng = random.Random(seed)
    for _ in range(rng.randint(5, 40)):
        event, heard = rng.random(), sorted(set(mesh.held) - set(mesh.silent))
        if event < 0.25 and heard:
            mesh.fall_silent(rng.choice(heard))
        elif event < 0.5 and mesh.silent:
            mesh.come_back(rng.choice(sorted(mesh.silent)))
        elif event < 0.6 and len(mesh.held) < 4:
            mesh.come()
        elif heard:
            mesh.obey(rng.choice(heard), rng.choice([slice(0, 1), slice(1, 2), slice(None)]))
        mesh.check()
    for shard in sorted(mesh.silent):
        mesh.come_back(shard)
    mesh.come(4 - len(mesh.held))
    mesh.settle()
    assert len(mesh.members.present()) == 4
    mesh.check_settled()
