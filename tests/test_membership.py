"""The controller's state machine, on a clock of the test's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, ShardReport
from expertmesh.routing.placement import Target, even_slots

LAYERS, EXPERTS, SHARDS, TIMEOUT_S = (0, 2), 6, 3, 10.0
SLOTS = even_slots(len(LAYERS), EXPERTS, SHARDS, 2)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def target(shard: str) -> Target:
    return Target(shard, "node", (f"unix:@{shard}",))


def beat(members: Membership, shard: str, **stats: Any) -> bool:
    """A heartbeat of a shard that serves what it was leased."""
    member = members.shards.get(shard)
    held = members.slots[member.index].copy() if member is not None else None
    heard = members.heartbeat(ShardReport(shard, target(shard), held, stats=stats))
    if heard:
        members.orders(shard)
    return heard


def attention(replica: str, loads: Any = None, epoch: int = 0) -> AttentionReport:
    counted = None if loads is None else np.full((len(LAYERS), EXPERTS), loads, dtype=np.int64)
    return AttentionReport(replica, "node", True, epoch, 0, counted)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def members(clock: Clock) -> Membership:
    return Membership(LAYERS, EXPERTS, SLOTS, TIMEOUT_S, clock)


def join(members: Membership, shard: str, held: int | None = None, seen: int = 0) -> Lease | None:
    return members.join(JoinRequest(shard, "node", held, seen_epoch=seen))


def bring_up(members: Membership, *shards: str) -> None:
    for shard in shards:
        assert join(members, shard) is not None
        assert beat(members, shard)


def test_each_shard_gets_experts_of_its_own(members: Membership) -> None:
    leases = [join(members, shard) for shard in "abc"]
    assert [lease.index for lease in leases if lease] == [0, 1, 2]
    for lease in leases:
        assert lease is not None
        assert np.array_equal(lease.slots, SLOTS[lease.index])


def test_a_shard_that_asks_twice_has_one_lease(members: Membership) -> None:
    first, again = join(members, "a"), join(members, "a")
    assert first is not None
    assert again is not None
    assert first.index == again.index
    assert len(members.shards) == 1


def test_one_too_many_stands_by_until_an_index_is_free(members: Membership) -> None:
    bring_up(members, "a", "b", "c")
    assert join(members, "d") is None
    assert not beat(members, "d")
    assert members.table().missing == 0
    assert "d" not in {t.shard for t in members.table().targets}
    members.leave("b")
    lease = join(members, "d")
    assert lease is not None
    assert lease.index == 1


def test_a_shard_is_in_the_table_while_it_serves(members: Membership) -> None:
    assert join(members, "a") is not None
    assert members.heartbeat(ShardReport("a", None))
    assert members.table().targets == ()
    assert members.table().missing == len(LAYERS) * EXPERTS
    assert members.epoch == 0, "nothing changed for dispatchers"
    assert beat(members, "a")
    assert members.table().targets == (target("a"),)
    epoch = members.epoch
    assert epoch > 0
    assert beat(members, "a", pairs=3)
    assert members.epoch == epoch, "the same again"
    assert members.shards["a"].stats == {"pairs": 3}
    members.leave("a")
    assert members.table().targets == ()
    assert members.epoch > epoch
    members.leave("a")
    assert members.epoch == epoch + 1


def test_moving_to_another_address_is_a_change(members: Membership) -> None:
    bring_up(members, "a")
    epoch = members.epoch
    moved = Target("a", "node", ("tcp:10.0.0.1:5",))
    assert members.heartbeat(ShardReport("a", moved))
    assert members.table().targets == (moved,)
    assert members.epoch > epoch


def test_who_is_not_heard_of_is_dropped(members: Membership, clock: Clock) -> None:
    bring_up(members, "a", "b")
    members.report(attention("x"))
    epoch = members.epoch
    clock.now += TIMEOUT_S
    assert members.expire() == []
    assert beat(members, "b")
    clock.now += 0.001
    assert sorted(members.expire()) == ["a", "x"]
    assert members.lost == {"attention": 1, "experts": 1}
    assert members.epoch > epoch
    assert members.table().targets == (target("b"),)
    assert members.attention == {}
    assert members.expire() == []
    assert not beat(members, "a"), "it must join again"
    lease = join(members, "a", held=0)
    assert lease is not None
    assert lease.index == 0


def test_a_shard_that_was_away_does_not_get_experts_that_went_to_another(members: Membership, clock: Clock) -> None:
    bring_up(members, "a", "b", "c")
    clock.now += TIMEOUT_S + 1
    members.expire()
    assert join(members, "new") is not None  # takes index 0, a's
    assert join(members, "a", held=0) is None
    assert join(members, "b", held=1) is not None


@pytest.mark.parametrize("held", [-1, SHARDS, 99])
def test_an_index_that_the_placement_does_not_have(members: Membership, held: int) -> None:
    assert join(members, "a", held=held) is None
    assert members.shards == {}


def test_loading_shards_keep_their_lease_by_heartbeats_only(members: Membership, clock: Clock) -> None:
    assert join(members, "a") is not None
    for _ in range(5):
        clock.now += TIMEOUT_S - 1
        assert members.heartbeat(ShardReport("a", None))
        assert members.expire() == []
    assert join(members, "b") is not None
    clock.now += TIMEOUT_S + 1
    assert sorted(members.expire()) == ["a", "b"]


def test_a_new_controller_gives_back_what_was_held_and_goes_on_above_every_epoch(clock: Clock) -> None:
    old = Membership(LAYERS, EXPERTS, SLOTS, TIMEOUT_S, clock)
    bring_up(old, "a", "b", "c")
    seen = old.epoch
    old.leave("b")  # told to the attention replica, not to the shards any more
    told = old.epoch
    new = Membership(LAYERS, EXPERTS, SLOTS, TIMEOUT_S, clock)
    assert not beat(new, "c")
    for shard, held in (("c", 2), ("a", 0)):
        lease = join(new, shard, held=held, seen=seen)
        assert lease is not None
        assert lease.index == held
        assert lease.epoch > seen
        assert beat(new, shard)
    new.report(attention("x", epoch=told))
    assert new.epoch > told, "an attention replica that has seen `told` would not take this table"
    assert new.table().targets == (target("a"), target("c"))


@pytest.mark.parametrize("told", [0, 5, 1000])
def test_what_attention_replicas_have_seen_is_exceeded(members: Membership, told: int) -> None:
    members.report(attention("x", epoch=told))
    bring_up(members, "a")
    assert members.epoch > told
    epoch = members.epoch
    members.report(attention("x", epoch=epoch))
    assert members.epoch == epoch, "it is up to date"


def test_loads_add_up(members: Membership, clock: Clock) -> None:
    assert members.loads().tolist() == np.zeros((len(LAYERS), EXPERTS)).tolist()
    members.report(attention("x", 5))
    members.report(attention("y", 7))
    members.report(attention("z"))
    assert (members.loads() == 12).all()
    members.report(attention("x", 6))  # counts since its start, not since the last report
    assert (members.loads() == 13).all()
    clock.now += TIMEOUT_S + 1
    members.report(attention("y", 8))
    assert sorted(members.expire()) == ["x", "z"]
    assert (members.loads() == 14).all(), "what x dispatched was dispatched"
    members.report(attention("w", 100))
    assert (members.loads() == 114).all()


def test_loads_of_a_replica_that_was_only_away_are_not_counted_twice(members: Membership, clock: Clock) -> None:
    members.report(attention("x", 5))
    for again in (6, 8):
        clock.now += TIMEOUT_S + 1
        assert members.expire() == ["x"]
        members.report(attention("x", again))
        assert (members.loads() == again).all()


def test_loads_of_very_many_replicas_that_are_gone_take_no_more_memory(members: Membership, clock: Clock) -> None:
    for number in range(300):
        members.report(attention(f"r{number}", 1))
        clock.now += TIMEOUT_S + 1
        members.expire()
    assert (members.loads() == 300).all()
    held = [value for value in vars(members).values() if isinstance(value, dict)]
    assert max(map(len, held)) < 100


@pytest.fixture
def patient(clock: Clock) -> Membership:
    """Three shards and an attention replica, whose heartbeats are to come every second."""
    members = Membership(LAYERS, EXPERTS, SLOTS, TIMEOUT_S, clock, suspect_s=2.0, intervals_s=(1.0, 1.0))
    bring_up(members, "a", "b", "c")
    members.report(attention("x"))
    return members


def test_a_shard_that_loads_may_be_silent_for_longer(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    patient.heartbeat(ShardReport("a", target("a"), np.full_like(patient.slots[0], -1)))
    patient.orders("a")
    beats(patient, clock, "bc", 1.0, 11 * int(TIMEOUT_S))
    assert patient.expire() == []
    beats(patient, clock, "bc", 1.0, int(TIMEOUT_S) + 1)
    assert patient.expire() == ["a"]


def test_what_a_shard_was_not_told_yet_it_does_not_load(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    patient.order(0, 0, 5)
    beats(patient, clock, "bc", 1.0, int(TIMEOUT_S) + 1)
    assert patient.expire() == ["a"]


def test_a_broken_connection_ends_that(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    patient.heartbeat(ShardReport("a", target("a"), np.full_like(patient.slots[0], -1)))
    patient.orders("a")
    beats(patient, clock, "bc", 1.0, 3)
    patient.report(AttentionReport("x", "node", True, 0, 0, None, stats={"down": ["a"]}))
    assert patient.expire() == ["a"]


def beats(members: Membership, clock: Clock, shards: str, gap_s: float, times: int) -> None:
    """Heartbeats of some shards and reports of the attention replica, always so many seconds after the last."""
    for _ in range(times):
        clock.now += gap_s
        for shard in shards:
            assert beat(members, shard)
        members.report(attention("x"))


def test_who_falls_silent_among_punctual_ones_is_dropped_in_time(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    beats(patient, clock, "bc", 1.0, int(TIMEOUT_S))
    assert patient.expire() == []
    beats(patient, clock, "bc", 1.0, 1)
    assert patient.expire() == ["a"]


def test_nobody_is_taken_for_dead_where_all_heartbeats_come_late(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 4.0, 3)
    beats(patient, clock, "bc", 4.0, 9)
    assert patient.expire() == [], "36 s without a word, of 40"
    beats(patient, clock, "bc", 4.0, 2)
    assert patient.expire() == ["a"], "but not for ever"


def test_a_lease_stands_for_one_that_was_only_late(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    leased = patient.slots.copy()
    beats(patient, clock, "bc", 1.0, int(TIMEOUT_S) + 1)
    assert patient.expire() == ["a"]
    partly = leased[0].copy()
    partly[0] = -1
    lease = patient.join(JoinRequest("a", "node", 0, partly))
    assert lease is not None
    assert np.array_equal(lease.slots, leased[0]), "it goes on loading the rest"


def test_a_controller_that_was_held_up_takes_nobody_for_dead(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    clock.now += 3 * TIMEOUT_S
    assert patient.expire() == []
    beats(patient, clock, "abc", 0.0, 3)
    beats(patient, clock, "bc", 1.0, int(TIMEOUT_S) + 1)
    assert patient.expire() == ["a"]


def test_most_shards_may_die_at_once_where_connections_tell(patient: Membership, clock: Clock) -> None:
    beats(patient, clock, "abc", 1.0, 3)
    for _ in range(3):
        clock.now += 1.0
        beat(patient, "c")
        patient.report(AttentionReport("x", "node", True, 0, 0, None, stats={"down": ["a", "b"]}))
    assert sorted(patient.expire()) == ["a", "b"]


def test_loads_given_out_are_a_copy(members: Membership) -> None:
    members.report(attention("x", 5))
    members.loads()[:] = 0
    assert (members.loads() == 5).all()


class Life(RuleBasedStateMachine):
    """Shards that come, serve, fall silent and come back, and controllers that restart; what must always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.held: dict[str, int] = {}
        self.told = 0
        self.seen: dict[str, int] = {}

    @initialize()
    def first_start(self) -> None:
        """A controller that knows nobody."""
        self.members = Membership(LAYERS, EXPERTS, SLOTS, TIMEOUT_S, self.clock)
        self.last: tuple[int, Any] = (-1, None)

    @rule()
    def restart(self) -> None:
        """It lost everything."""
        self.first_start()

    shards = st.sampled_from([f"s{i}" for i in range(5)])

    @rule(shard=shards)
    def shard_joins(self, shard: str) -> None:
        """A fresh process asks for experts, or one that holds some asks for the same."""
        held = self.held.get(shard)
        lease = join(self.members, shard, held, self.seen.get(shard, 0))
        if lease is None:
            if held is not None:  # its experts went to another: it restarts
                del self.held[shard]
            else:
                assert len(self.members.shards) == SHARDS
            return
        assert held in (None, lease.index)
        assert np.array_equal(lease.slots, SLOTS[lease.index])
        self.held[shard] = lease.index

    @rule(shard=shards)
    def shard_beats(self, shard: str) -> None:
        """A shard that has loaded reports."""
        if shard in self.held and beat(self.members, shard):
            self.seen[shard] = self.members.epoch

    @rule(shard=shards)
    def shard_leaves(self, shard: str) -> None:
        """It ends in order."""
        self.members.leave(shard)
        self.held.pop(shard, None)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        """And the silent are dropped."""
        self.clock.now += seconds
        for gone in self.members.expire():
            assert gone not in self.members.shards
        assert all(m.seen >= self.clock.now - TIMEOUT_S for m in self.members.shards.values())

    @rule()
    def attention_reports(self) -> None:
        """A replica that has taken the newest table it was offered."""
        self.members.report(attention("x", epoch=self.told))
        assert self.members.epoch >= self.told

    @precondition(lambda self: self.members.epoch > self.told)
    @rule()
    def attention_learns(self) -> None:
        """A replica takes a newer table."""
        self.told = self.members.epoch

    @invariant()
    def leases_are_unique(self) -> None:
        """No index is leased twice."""
        indices = [m.index for m in self.members.shards.values()]
        assert len(set(indices)) == len(indices) <= SHARDS

    @invariant()
    def the_epoch_names_the_table(self) -> None:
        """Within a controller's life it never goes back, and two tables of one epoch are the same."""
        table = self.members.table()
        epoch, targets = self.last
        assert table.epoch >= epoch
        assert table.epoch > epoch or table.targets == targets
        self.last = (table.epoch, table.targets)


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
