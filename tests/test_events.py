"""The timeline, and what the controller's state machines tell it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from expertmesh.deployments.controller.chronicle import Chronicle
from expertmesh.deployments.controller.events import Event, Kind, Timeline, first_event
from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.controller.replacement import Replacement
from expertmesh.deployments.controller.takeover import Takeover
from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport
from expertmesh.routing.placement import Move, Target, even_slots

LAYERS, EXPERTS, TIMEOUT_S = (0, 2), 6, 10.0


def ids(events: list[Event]) -> list[int]:
    return [event.id for event in events]


# --- the timeline ---


def test_ids_grow_over_controllers_and_a_reader_misses_none_and_has_none_twice() -> None:
    first, second = Timeline(1, lambda: 50.0), Timeline(2, lambda: 60.0)
    assert first.after(0) == []
    old = [first.add(Kind.EPOCH, "one", epoch=1), first.add(Kind.EPOCH, "two", epoch=2)]
    assert ids(old) == [first_event(1) + 1, first_event(1) + 2]
    assert first.after(0) == old
    assert first.after(old[0].id) == old[1:]
    assert first.after(old[1].id) == []
    new = second.add(Kind.OFFICE, "second", term=2)
    assert new.id > old[1].id
    assert second.after(old[1].id) == [new]


def test_an_id_of_another_mesh_is_answered_with_everything() -> None:
    timeline = Timeline(1, lambda: 50.0)
    event = timeline.add(Kind.EPOCH, "one", epoch=1)
    assert timeline.after(event.id) == []
    assert timeline.after(event.id + 1) == [event]
    assert timeline.after(first_event(7)) == [event]


def test_only_the_newest_are_kept_and_each_rings() -> None:
    rung = itertools.count()
    timeline = Timeline(1, lambda: 50.0, lambda: next(rung) and None, kept=3)
    events = [timeline.add(Kind.EPOCH, str(n), epoch=n) for n in range(5)]
    assert timeline.after(0) == events[2:]
    assert next(rung) == 5


def test_times_do_not_go_back() -> None:
    clock = iter([50.0, 40.0, 60.0])
    timeline = Timeline(1, lambda: next(clock))
    assert [timeline.add(Kind.EPOCH, "", epoch=n).at for n in range(3)] == [50.0, 50.0, 60.0]


def test_an_event_is_json() -> None:
    event = Timeline(1, lambda: 1.5).add(Kind.SHARD_LOST, "shard a is lost", shard="a", index=3)
    assert event.to_dict() == {
        "id": first_event(1) + 1,
        "at": 1.5,
        "kind": "shard_lost",
        "text": "shard a is lost",
        "about": {"shard": "a", "index": 3},
    }


# --- what is told ---


class Mesh:
    """A controller's state machines and what they told."""

    def __init__(self) -> None:
        self.now = 0.0
        slots = np.pad(even_slots(len(LAYERS), EXPERTS, 2, 1), ((0, 0), (0, 0), (0, 1)), constant_values=-1)
        self.members = Membership(LAYERS, EXPERTS, slots, TIMEOUT_S, lambda: self.now, staging=True)
        self.replacement = Replacement(self.members, 1)
        self.takeover = Takeover(self.members, self.replacement)
        self.timeline = Timeline(1, lambda: self.now)
        self.chronicle = Chronicle(self.timeline, self.members, self.replacement, self.takeover)
        self._epoch, self._read = 0, 0

    def follow_up(self, lost: list[str] | None = None) -> None:
        """As the controller does."""
        self.chronicle.look_at_members(lost or [])
        self.takeover.advance()
        self.replacement.advance()
        self.chronicle.look_at_placement()
        if self.members.epoch != self._epoch:
            self._epoch = self.members.epoch
            self.chronicle.published(self._epoch, self.members.table().missing)

    def beat(self, shard: str, serves: bool = True) -> None:
        """A heartbeat of a shard that does what it is told."""
        member = self.members.shards[shard]
        held = self.members.slots[member.index].copy() if serves else None
        target = Target(shard, "node", (f"unix:@{shard}",)) if serves else None
        self.members.heartbeat(ShardReport(shard, target, held))
        self.follow_up()

    def join(self, *shards: str) -> None:
        """New shards that serve."""
        for shard in shards:
            assert self.members.join(JoinRequest(shard, "node")) is not None
            self.beat(shard)

    def attention(self, replica: str, ready: bool = True) -> None:
        """A report of a replica that goes by the newest table."""
        self.members.report(AttentionReport(replica, "node", ready, self.members.epoch, 0, None))
        self.follow_up()

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and what it is about, of the events since the last call."""
        events = self.timeline.after(self._read)
        self._read = self.timeline.newest
        return [(str(event.kind), dict(event.about)) for event in events]


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


def kinds(told: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [kind for kind, _ in told]


def test_a_start(mesh: Mesh) -> None:
    assert mesh.members.join(JoinRequest("a", "node")) is not None
    mesh.beat("a", serves=False)
    assert mesh.told() == [("shard_joined", {"shard": "a", "index": 0, "node": "node"})]
    mesh.beat("a")
    serving = ("shard_serving", {"shard": "a", "index": 0, "node": "node", "experts": 6})
    assert mesh.told() == [serving, ("epoch", {"epoch": 1})], "what was never there is not missing"
    mesh.join("b")
    assert kinds(mesh.told()) == ["shard_joined", "shard_serving", "epoch", "experts_whole"]
    mesh.attention("r", ready=False)
    mesh.attention("r")
    mesh.attention("r")
    assert kinds(mesh.told()) == ["replica_joined", "replica_ready"]
    mesh.beat("a")
    assert mesh.told() == [], "nothing has changed"


def test_a_shard_is_lost_and_another_takes_its_experts(mesh: Mesh) -> None:
    mesh.join("a", "b")
    mesh.attention("r")
    mesh.told()
    mesh.now = TIMEOUT_S - 1
    mesh.beat("a")
    mesh.attention("r")
    mesh.now = TIMEOUT_S + 1
    lost = mesh.members.expire()
    mesh.follow_up(lost)
    told = mesh.told()
    assert kinds(told) == ["shard_lost", "takeover", "epoch", "experts_missing"]
    assert told[0][1] == {"shard": "b", "index": 1}
    assert told[1][1] == {"experts": 6}
    assert told[3][1] == {"experts": 6}
    mesh.beat("a")
    mesh.attention("r")
    assert kinds(mesh.told())[:2] == ["epoch", "experts_whole"]


def test_a_shard_that_says_that_it_goes_is_not_lost(mesh: Mesh) -> None:
    mesh.join("a", "b")
    mesh.told()
    mesh.members.leaving("b")
    mesh.follow_up()
    assert kinds(mesh.told())[0] == "shard_leaving"
    mesh.members.leave("b")
    mesh.follow_up()
    told = mesh.told()
    assert ("shard_gone", {"shard": "b", "index": 1}) in told
    assert "shard_lost" not in kinds(told)


def test_an_attention_replica_that_is_not_heard_of(mesh: Mesh) -> None:
    mesh.attention("r")
    mesh.told()
    mesh.now = TIMEOUT_S + 1
    mesh.follow_up(mesh.members.expire())
    assert mesh.told() == [("replica_lost", {"replica": "r"})]


def test_moves_are_told_together(mesh: Mesh) -> None:
    mesh.join("a", "b")
    mesh.attention("r")
    mesh.told()
    slots = mesh.members.slots
    mine, others = int(slots[0, 0, 0]), int(slots[1, 0, 0])
    swap = [Move(0, 0, 0, 0, mine, others, 0.5, 0.9), Move(0, 0, 1, 0, others, mine, 0.5, 0.9)]
    mesh.replacement.start(swap)
    mesh.follow_up()
    assert mesh.told() == [("moves_begun", {"moves": 2})]
    for _ in range(10):
        for shard in ("a", "b"):
            mesh.beat(shard)
        mesh.attention("r")
    assert not mesh.replacement.busy
    told = mesh.told()
    assert sum(about["moves"] for kind, about in told if kind == "moves_done") == 2
    assert "moves_failed" not in kinds(told)


def test_a_move_that_can_not_begin_has_failed_and_says_why(mesh: Mesh) -> None:
    mesh.join("a", "b")
    mesh.told()
    mine = int(mesh.members.slots[0, 0, 0])
    mesh.replacement.start([Move(0, 0, 1, 0, mine, -1, 0.5, 0.9)])
    mesh.follow_up()
    assert mesh.told() == [("moves_failed", {"moves": 1})]
    assert "the placement has changed" in mesh.timeline.after(0)[-1].text


def test_scaling_and_freezing(mesh: Mesh) -> None:
    before: dict[str, int | None] = {"attention": 1, "experts": 2}
    mesh.chronicle.scaled(before, before, "hand")
    assert mesh.told() == []
    mesh.chronicle.scaled(before, {"attention": 1, "experts": 4}, "signals")
    assert mesh.told() == [("scale", {"deployment": "experts", "before": 2, "after": 4, "by": "signals"})]
    mesh.chronicle.scaled({"attention": 1, "experts": None}, {"attention": 2, "experts": None}, "hand")
    mesh.chronicle.froze(True)
    mesh.chronicle.shifted(3)
    assert kinds(mesh.told()) == ["scale", "freeze", "traffic_shifted"]
