"""When a plan is made and from what, on times of the test's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from expertmesh.deployments.controller.controller import initial_slots
from expertmesh.deployments.controller.planner import (
    Planner,
    Situation,
    measured_rates,
    planning_slots,
    predicted_balancedness,
)
from expertmesh.routing.placement import Limits, Loads, applied
from expertmesh.routing.placement.static import IntArray

LAYERS, EXPERTS, SHARDS = 2, 8, 4
MIX = np.array([[80, 10, 10, 10, 70, 10, 10, 10], [10, 10, 90, 10, 10, 10, 60, 10]], dtype=np.int64)
OTHER = MIX[:, ::-1].copy()


def planner() -> Planner:
    return Planner(LAYERS, EXPERTS, 1, 30.0, Limits(1, 32, least_gain=0.02), now=100.0)


def situation(loads: Loads, slots: IntArray | None = None) -> Situation:
    if slots is None:
        slots = planning_slots(initial_slots(LAYERS, EXPERTS, SHARDS, 1, 1, staging=True), 3, staging=True)
    return Situation(slots, loads, np.full(SHARDS, 1000.0), np.ones(SHARDS, dtype=bool), True, 3, 1000, 1e9)


def test_windows_add_up_and_the_one_that_has_begun_counts_without_ending() -> None:
    plans = planner()
    assert not plans.observe(MIX, 110.0)
    assert_allclose(plans.loads.rows_a_second, MIX / 10)
    for _ in range(2):  # looking changes nothing
        assert_allclose(plans.current(3 * MIX, 120.0).tokens.sum(), MIX.sum() * (2 + 0.5 ** (1 / 3)))
    assert_allclose(plans.loads.rows_a_second, MIX / 10)
    assert plans.current(3 * MIX, 110.0) is plans.loads, "no time has passed"
    assert not plans.observe(2 * MIX, 120.0)
    assert_allclose(plans.loads.rows_a_second, MIX / 10)
    assert not plans.observe(2 * MIX, 500.0), "a window without a token says nothing"
    assert_allclose(plans.loads.rows_a_second, MIX / 10)


def test_after_a_shift_the_old_mix_is_forgotten() -> None:
    plans = planner()
    plans.observe(MIX, 110.0)
    assert plans.observe(MIX + OTHER, 120.0)
    assert plans.shifted == [0, 1]
    assert_allclose(plans.loads.rows_a_second, OTHER / 10)
    assert not plans.observe(MIX + 2 * OTHER, 130.0)
    assert plans.shifted == []


def test_nothing_is_planned_by_a_handful_of_tokens() -> None:
    plans = planner()
    few = Loads.none(LAYERS, EXPERTS).after(np.eye(LAYERS, EXPERTS, dtype=np.int64) * 63, 1.0, 30.0)
    assert plans.moves(situation(few)) == []
    many = Loads.none(LAYERS, EXPERTS).after(np.eye(LAYERS, EXPERTS, dtype=np.int64) * 64, 1.0, 30.0)
    assert plans.moves(situation(many))


def test_a_plan_makes_the_layers_more_even_until_nothing_pays() -> None:
    plans = planner()
    now = situation(Loads.none(LAYERS, EXPERTS).after(MIX * 100, 10.0, 30.0))
    before = predicted_balancedness(now)
    for _ in range(8):
        moves = plans.moves(now)
        if not moves:
            break
        now = situation(now.loads, applied(now.slots, moves))
    assert not moves
    assert predicted_balancedness(now) > before


def test_an_expert_that_nobody_is_leased_comes_first() -> None:
    slots = planning_slots(initial_slots(LAYERS, EXPERTS, SHARDS, 1, 1, staging=True), 3, staging=True)
    copies = [expert for expert in range(EXPERTS) if (slots[:, 0] == expert).sum() == 1]
    slots[:, 0][slots[:, 0] == copies[0]] = -1
    moves = planner().moves(situation(Loads.none(LAYERS, EXPERTS), slots))
    assert [(move.layer, move.added) for move in moves] == [(0, copies[0])]


def test_nothing_is_planned_while_experts_change_hands() -> None:
    whole = situation(Loads.none(LAYERS, EXPERTS).after(MIX * 100, 10.0, 30.0))
    assert planner().moves(whole)
    assert planner().moves(replace(whole, settled=False)) == []
    assert planner().moves(replace(whole, ready=np.zeros(SHARDS, dtype=bool))) == []


def test_no_shard_is_given_more_where_one_is_crowded() -> None:
    now = situation(Loads.none(LAYERS, EXPERTS).after(MIX * 100, 10.0, 30.0))
    wide = replace(now, slots=np.pad(now.slots, ((0, 0), (0, 0), (0, 1)), constant_values=-1))
    moves = planner().moves(wide)
    assert moves
    assert all(move.dropped >= 0 for move in moves)


def test_small_differences_of_speed_are_noise() -> None:
    stats = {0: {"pairs": 1000, "busy_s": 1.0}, 1: {"pairs": 1100, "busy_s": 1.0}, 2: {"pairs": 500, "busy_s": 1.0}}
    assert_allclose(measured_rates(stats, 4), [1000, 1000, 500, 1000])
    assert_array_equal(measured_rates({0: {"pairs": 0, "busy_s": 0.0}}, 2), [1, 1])


def test_the_planner_sees_no_more_empty_slots_than_shards_are_to_fill() -> None:
    slots = np.array([[[3, -1, 1, -1], [-1, 2, -1, -1]]], dtype=np.int32)
    assert_array_equal(planning_slots(slots, 2, staging=True), [[[3, 1], [2, -1]]])
    assert_array_equal(planning_slots(slots, 1, staging=True), [[[3, 1], [2, -1]]])
    assert_array_equal(planning_slots(slots, 9, staging=True), [[[3, 1, -1], [2, -1, -1]]])
    full = np.array([[[3, 0, 1]]], dtype=np.int32)
    assert_array_equal(planning_slots(full, 2, staging=True), full)
