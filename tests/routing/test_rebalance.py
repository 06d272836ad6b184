"""Placements from loads, re-placement and repair: pure functions, so properties."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.routing.placement import (
    Limits,
    Move,
    applied,
    balancedness,
    even_slots,
    layer_balancedness,
    loaded_slots,
    plan,
    repair,
)
from expertmesh.routing.placement.layer import LayerState
from expertmesh.routing.placement.moves import Bytes
from expertmesh.routing.placement.static import IntArray

Floats = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Mesh:
    """Any placement that a mesh may have: empty slots, shards that are away, experts below their redundancy."""

    slots: IntArray
    loads: Floats
    redundancy: int
    rates: Floats
    ready: Mask

    def plan(self, limits: Limits, free_bytes: Bytes | None = None) -> list[Move]:
        return plan(
            self.slots,
            self.loads,
            redundancy=self.redundancy,
            rates=self.rates,
            ready=self.ready,
            free_bytes=free_bytes,
            limits=limits,
        )

    def copies(self, slots: IntArray) -> IntArray:
        """Ready shards that hold each expert: [L, E]."""
        return held(slots[self.ready], self.loads.shape[1]).sum(axis=0).astype(np.int32)

    def balancedness(self, slots: IntArray) -> float:
        seconds, up = (1 / self.rates).tolist(), self.ready.tolist()
        layers = range(len(self.loads))
        return float(np.mean([LayerState(slots[:, i], self.loads[i], seconds, up).balancedness() for i in layers]))


def held(slots: IntArray, experts: int) -> Mask:
    """Which shard holds which expert: [S, L, E]."""
    return (slots[..., None] == np.arange(experts)).any(axis=2)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    shards, layers, experts = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(1, 12))
    redundancy = draw(st.integers(1, min(2, shards)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = even_slots(layers, experts, shards, redundancy)
    extra = draw(st.integers(0, 2))
    slots = np.concatenate([slots, np.full((shards, layers, extra), -1, dtype=np.int32)], axis=2)
    for shard, layer, slot in np.argwhere(slots < 0):  # some extra copies, never twice on a shard
        expert = rng.integers(-1, experts)
        if expert not in slots[shard, layer]:
            slots[shard, layer, slot] = expert
    loads = rng.lognormal(0, draw(st.sampled_from([0.0, 1.0, 3.0])), (layers, experts))
    loads *= rng.random((layers, experts)) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    ready = rng.random(shards) > draw(st.sampled_from([0.0, 0.3]))
    return Mesh(slots, loads, redundancy, rng.choice([0.5, 1.0, 2.0], shards), ready)


def by_step(moves: list[Move]) -> list[list[Move]]:
    return [
        [move for move in moves if move.step == step] for step in range(max((m.step for m in moves), default=-1) + 1)
    ]


def check_steps(mesh: Mesh, moves: list[Move], redundancy: int) -> None:
    """What holds for each step that is carried out, plan or repair."""
    experts = mesh.loads.shape[1]
    slots = mesh.slots
    steps = by_step(moves)
    assert moves == [move for step in steps for move in step], "not in the order of the steps"
    for step in steps:
        assert len({(m.layer, m.shard) for m in step}) == len(step), "two changes at once on one shard and layer"
        assert all(mesh.ready[m.shard] for m in step)
        before = mesh.copies(slots)
        for move in step:
            assert move.added not in slots[move.shard, move.layer], "an expert twice on a shard"
        slots = applied(slots, step)
        after = mesh.copies(slots)
        assert (after >= np.minimum(before, redundancy)).all(), "redundancy was lowered"
        assert held(slots, experts).sum() == (slots >= 0).sum(), "an expert twice on a shard"


@given(mesh=meshes(), steps=st.integers(1, 4))
def test_a_plan_keeps_redundancy_slots_and_shards(mesh: Mesh, steps: int) -> None:
    moves = mesh.plan(Limits(steps=steps))
    check_steps(mesh, moves, mesh.redundancy)
    assert len(by_step(moves)) <= steps
    for step in by_step(moves):
        for layer in {m.layer for m in step}:
            changes = [m for m in step if m.layer == layer]
            assert len(changes) <= 2
            assert len({(m.before, m.after) for m in changes}) == 1


@given(mesh=meshes(), least=st.sampled_from([0.0, 0.002, 0.1]))
def test_nothing_is_moved_for_nothing(mesh: Mesh, least: float) -> None:
    """Each layer that is touched has a peak lower by more than its moves cost, and no layer ends up worse."""
    moves = mesh.plan(Limits(steps=8, least_gain=least))
    after = applied(mesh.slots, moves)
    seconds, up = (1 / mesh.rates).tolist(), mesh.ready.tolist()
    for layer in {m.layer for m in moves}:
        loads = mesh.loads[layer]
        peak, new_peak = (LayerState(s[:, layer], loads, seconds, up).peak for s in (mesh.slots, after))
        cost = least * loads.sum() / mesh.rates[mesh.ready].sum()
        mine = [m for m in moves if m.layer == layer]
        # Predictions settle to 0.5 % of the optimum, from one side in the plan and from the other here.
        assert peak * 1.01 - new_peak > cost * len(mine)
        assert mine[-1].after > mine[0].before


def test_a_level_layer_and_one_without_load_are_left_alone() -> None:
    for loads in (np.ones((2, 16)), np.zeros((2, 16))):
        mesh = Mesh(even_slots(2, 16, 4, 1), loads, 1, np.ones(4), np.ones(4, dtype=bool))
        assert mesh.plan(Limits(steps=4, least_gain=0.0)) == []


def test_one_shard_takes_one_expert_a_step() -> None:
    """Shard 2 is ten times as fast and takes both hot experts, but has one staging slot."""
    slots = np.array([[[0, 2]], [[1, 3]], [[-1, -1]]], dtype=np.int32)
    loads, rates = np.array([[10.0, 10, 1, 1]]), np.array([1.0, 1, 10])
    mesh = Mesh(slots, loads, 1, rates, np.ones(3, dtype=bool))
    moves = mesh.plan(Limits(steps=4))
    check_steps(mesh, moves, 1)
    on_fast = [move for move in moves if move.shard == 2]
    assert [move.step for move in on_fast] == [0, 1]
    assert {move.added for move in on_fast} == {0, 1}
    assert mesh.balancedness(applied(slots, moves)) > 0.98


def test_nobody_ready_is_no_plan() -> None:
    mesh = Mesh(even_slots(2, 16, 4, 1), np.ones((2, 16)), 1, np.ones(4), np.zeros(4, dtype=bool))
    assert mesh.plan(Limits()) == []


def hot_mesh(rates: Floats | None = None) -> Mesh:
    """One expert has half of all tokens; each shard has one empty slot."""
    slots = np.concatenate([even_slots(1, 8, 4, 1), np.full((4, 1, 1), -1, dtype=np.int32)], axis=2)
    loads = np.array([[7.0, 1, 1, 1, 1, 1, 1, 1]])
    return Mesh(slots, loads, 1, np.ones(4) if rates is None else rates, np.ones(4, dtype=bool))


def test_a_hot_expert_gets_copies_until_the_layer_is_level() -> None:
    mesh = hot_mesh()
    moves = mesh.plan(Limits(steps=2))
    assert {(move.added, move.dropped) for move in moves} == {(0, -1)}
    assert mesh.balancedness(mesh.slots) == pytest.approx(14 / 4 / 8, rel=1e-4)
    assert mesh.balancedness(applied(mesh.slots, moves)) == pytest.approx(1.0, abs=0.01)
    assert moves[0].before == pytest.approx(14 / 4 / 8, rel=1e-4)
    assert str(moves[0]).startswith(
        f"step 0: layer 0, shard {moves[0].shard}, slot 2: expert 0 in an empty slot; balan"
    )


def test_a_move_must_win_more_than_its_bytes_cost() -> None:
    """The peak falls from 8 busy seconds a second to 4.5: 3.5 s won in each second of the horizon, for two moves."""
    mesh = hot_mesh()
    dear = Limits(steps=1, expert_bytes=1000, bytes_a_second=100.0, horizon_s=1.0)
    assert mesh.plan(dear) == []
    longer = Limits(steps=1, expert_bytes=1000, bytes_a_second=100.0, horizon_s=100.0)
    assert mesh.plan(longer) != []


def test_empty_slots_are_filled_only_as_far_as_bytes_last() -> None:
    mesh = hot_mesh()
    limits = Limits(steps=4, expert_bytes=100)
    free = np.array([1000, 99, 0, 250])
    moves = mesh.plan(limits, free)
    assert moves
    assert {move.shard for move in moves if move.dropped < 0} == {3}
    assert all(move.dropped >= 0 for move in mesh.plan(limits, np.zeros(4, dtype=np.int64)))


@given(mesh=meshes(), free=st.integers(0, 500))
def test_capacity_in_bytes_is_kept(mesh: Mesh, free: int) -> None:
    free_bytes = np.full(len(mesh.slots), free)
    moves = mesh.plan(Limits(steps=8, expert_bytes=100, least_gain=0.0), free_bytes)
    mended = repair(
        mesh.slots,
        mesh.loads,
        redundancy=mesh.redundancy,
        rates=mesh.rates,
        ready=mesh.ready,
        free_bytes=free_bytes,
        expert_bytes=100,
    )
    for some in (moves, mended.moves):
        filled = (applied(mesh.slots, some) >= 0).sum(axis=(1, 2)) - (mesh.slots >= 0).sum(axis=(1, 2))
        assert (filled * 100 <= free).all()


def test_the_layer_that_gains_most_goes_first() -> None:
    one = hot_mesh()
    loads = np.concatenate([np.array([[2.0, 1, 1, 1, 1, 1, 1, 1]]), one.loads, np.ones((1, 8))])
    mesh = Mesh(np.repeat(one.slots, 3, axis=1), loads, 1, one.rates, one.ready)
    moves = mesh.plan(Limits(steps=3, moves_a_step=2))
    assert {move.layer for move in moves if move.step == 0} == {1}
    assert all(len(step) <= 2 for step in by_step(moves))
    assert {move.layer for move in moves} == {0, 1}


def test_a_slow_shard_keeps_little() -> None:
    mesh = hot_mesh(np.array([0.5, 1.0, 1.0, 1.0]))
    assert mesh.balancedness(applied(mesh.slots, mesh.plan(Limits(steps=4)))) > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_the_names_of_shards_and_experts_hardly_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0, 1, (4, 32))
    mesh = Mesh(loaded_slots(loads[::-1], 8, 6, 1), loads, 1, np.ones(8), np.ones(8, dtype=bool))
    expert, shard = rng.permutation(32), rng.permutation(8)
    renamed = Mesh(expert[mesh.slots][shard].astype(np.int32), loads[:, np.argsort(expert)], 1, mesh.rates, mesh.ready)
    ends = [each.balancedness(applied(each.slots, each.plan(Limits(steps=8)))) for each in (mesh, renamed)]
    assert ends[0] == pytest.approx(ends[1], abs=0.02)
    assert min(ends) > mesh.balancedness(mesh.slots)


def test_a_move_that_does_not_fit_is_refused() -> None:
    slots = even_slots(1, 8, 4, 1)
    with pytest.raises(ValueError, match="the slot holds expert 0, not 5"):
        applied(slots, [Move(0, 0, 0, 0, 5, 6, 0.5, 0.6)])


# -- repair ---------------------------------------------------------------------------------------------------------


@given(mesh=meshes())
def test_repair_mends_what_slots_allow(mesh: Mesh) -> None:
    result = repair(mesh.slots, mesh.loads, redundancy=mesh.redundancy, rates=mesh.rates, ready=mesh.ready)
    wanted = min(mesh.redundancy, int(mesh.ready.sum()))
    check_steps(mesh, result.moves, wanted)
    after = mesh.copies(applied(mesh.slots, result.moves))
    wanting = np.maximum(wanted - after, 0)
    assert sorted(result.unplaced) == [(int(a), int(b)) for a, b in np.argwhere(wanting) for _ in range(wanting[a, b])]
    if not (mesh.copies(mesh.slots) < wanted).any():
        assert result.moves == []


@pytest.mark.parametrize("gone", range(6))
def test_a_lost_shard_is_made_good_from_spare_slots(gone: int) -> None:
    loads = np.random.default_rng(gone).lognormal(0, 1, (4, 24))
    slots = loaded_slots(loads, 6, 10, 2)  # 60 slots, 48 needed, 50 left
    ready = np.arange(6) != gone
    result = repair(slots, loads, redundancy=2, rates=np.ones(6), ready=ready)
    assert result.unplaced == []
    assert held(applied(slots, result.moves)[ready], 24).sum(axis=0).min() == 2


def test_the_most_endangered_comes_first_then_the_hotter() -> None:
    slots = np.full((4, 1, 4), -1, dtype=np.int32)
    slots[0, 0, :3] = [0, 1, 2]
    slots[1, 0, :2] = [0, 1]
    slots[2, 0, :1] = [2]
    loads = np.array([[1.0, 5.0, 3.0]])
    ready = np.array([False, True, True, True])  # every expert has one copy but 3, which has none
    loads = np.append(loads, [[0.5]], axis=1)
    result = repair(slots, loads, redundancy=2, rates=np.ones(4), ready=ready)
    assert result.unplaced == []
    assert result.moves[0].added == 3
    first = {expert: [m.added for m in result.moves].index(expert) for expert in range(4)}
    assert first[3] < first[1]
    assert first[1] < first[0]


def test_room_is_made_by_way_of_a_shard_that_holds_the_expert_already() -> None:
    """The only free slot is on shard 0, with the only copy of expert 0: 2 goes there, and 0 takes its place."""
    slots = np.array([[[0, 1, -1]], [[1, 2, 3]], [[2, 4, 5]], [[3, 4, 5]], [[0, -1, -1]]], dtype=np.int32)
    mesh = Mesh(slots, np.ones((1, 6)), 2, np.ones(5), np.array([True, True, True, True, False]))
    result = repair(slots, mesh.loads, redundancy=2, rates=mesh.rates, ready=mesh.ready)
    check_steps(mesh, result.moves, 2)
    said = [(move.step, move.shard, move.slot, move.dropped, move.added) for move in result.moves]
    assert said == [(0, 0, 2, -1, 2), (1, 1, 1, 2, 0)]
    assert result.unplaced == []
    assert mesh.copies(applied(slots, result.moves)).tolist() == [[2] * 6]


# -- placements for a start -------------------------------------------------------------------------------------------


@given(
    shards=st.integers(1, 6),
    experts=st.integers(1, 16),
    extra=st.integers(0, 3),
    data=st.data(),
    sigma=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_a_placement_from_loads_holds_everything(
    shards: int, experts: int, extra: int, data: st.DataObject, sigma: float
) -> None:
    redundancy = data.draw(st.integers(1, shards))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    loads = rng.lognormal(0, sigma, (2, experts)) * (rng.random((2, experts)) > data.draw(st.sampled_from([0.0, 0.5])))
    count = -(-experts * redundancy // shards) + extra
    slots = loaded_slots(loads, shards, count, redundancy, rng.choice([0.5, 1.0, 2.0], shards))
    assert slots.shape == (shards, 2, count)
    on = held(slots, experts)
    assert on.sum() == (slots >= 0).sum(), "an expert twice on a shard"
    assert on.sum(axis=0).min() >= redundancy


def test_a_placement_from_loads_is_level() -> None:
    rng = np.random.default_rng(1)
    loads = rng.lognormal(0, 1.2, (6, 64))
    slots = loaded_slots(loads, 8, 10, 1)
    mesh = Mesh(slots, loads, 1, np.ones(8), np.ones(8, dtype=bool))
    assert mesh.balancedness(slots) > 0.98
    even = Mesh(even_slots(6, 64, 8, 1), loads, 1, mesh.rates, mesh.ready)
    assert even.balancedness(even.slots) < 0.8
    assert mesh.plan(Limits(steps=4)) == []


def test_the_worked_number_of_the_placement() -> None:
    slots = loaded_slots(np.array([[60.0, 20, 10, 10]]), 2, 3, 1)
    assert [set(slots[shard, 0].tolist()) & {0, 1} for shard in range(2)] == [{0, 1}, {0, 1}]
    assert {int(slots[shard, 0].max()) for shard in range(2)} == {2, 3}


@pytest.mark.parametrize(("slots", "redundancy", "what"), [(4, 0, "allowed"), (4, 4, "allowed"), (2, 1, "don't fit")])
def test_a_placement_that_can_not_be_is_refused(slots: int, redundancy: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        loaded_slots(np.ones((1, 9)), 3, slots, redundancy)


@pytest.mark.parametrize(("experts", "shards"), [(64, 4), (128, 16), (32, 8), (60, 16), (24, 6)])
def test_an_even_placement_spreads_partners(experts: int, shards: int) -> None:
    """No shard takes over most of what another one held, over the layers of a model, also where redundancy divides."""
    on = held(even_slots(12, experts, shards, 2), experts).reshape(shards, -1)
    shared = [int((on[a] & on[b]).sum()) for a, b in combinations(range(shards), 2)]
    assert max(shared) <= on.sum(axis=1).min() * max(0.25, 1.5 / (shards - 1))


# -- balancedness -----------------------------------------------------------------------------------------------------


def test_the_worked_number_of_balancedness() -> None:
    assert layer_balancedness(np.array([10.0, 20, 30, 20])) == pytest.approx(2 / 3)
    assert layer_balancedness(np.array([10.0, 20, 15, 20]), np.array([1.0, 1, 2, 1])) == pytest.approx(0.8)
    assert balancedness(np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])) == pytest.approx((1 + 1 + 0.5) / 3)


@given(times=st.lists(st.floats(0, 1e6), min_size=1, max_size=8), data=st.data())
def test_balancedness_is_between_a_shards_share_and_one(times: list[float], data: st.DataObject) -> None:
    even = float(layer_balancedness(np.array(times)))
    assert 1 / len(times) * (1 - 1e-9) <= even <= 1 + 1e-9
    turned = data.draw(st.permutations(times))
    assert float(layer_balancedness(np.array(turned))) == pytest.approx(even)
