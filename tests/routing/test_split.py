"""Splitting tokens over copies, and what a row costs where: pure functions, so properties."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.routing.dispatch.cost import ShardCost
from expertmesh.routing.dispatch.split import EXPERT_COST_ROWS, LayerSplit
from expertmesh.routing.placement import build_table, even_slots
from expertmesh.routing.placement.pouring import Pouring
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.placement.table import Target

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def split_tokens(
    counts: Counts,
    copies: IntArray,
    seconds: Floats,
    waiting: Floats,
    up: np.ndarray[Any, np.dtype[np.bool_]],
    opening: float = EXPERT_COST_ROWS,
) -> Counts:
    return LayerSplit(copies, up)(counts, seconds, waiting, opening)


@dataclass(frozen=True)
class Step:
    """Arguments of one decision."""

    counts: Counts
    copies: IntArray
    seconds: Floats
    waiting: Floats
    up: np.ndarray[Any, np.dtype[np.bool_]]
    opening: float

    def split(self) -> Counts:
        return split_tokens(self.counts, self.copies, self.seconds, self.waiting, self.up, self.opening)

    def finish(self, shares: Counts) -> float:
        """When the last shard is done."""
        times = np.where(self.up, self.waiting, 0.0)
        for expert, column in np.argwhere(shares > 0):
            shard = self.copies[expert, column]
            times[shard] += (shares[expert, column] + self.opening) * self.seconds[shard]
        return float(times.max())


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Any table: experts with no copy, with all of them; shards that are slow, busy, down."""
    shards, experts = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    held = [draw(st.lists(st.integers(0, shards - 1), unique=True, max_size=shards)) for _ in range(experts)]
    width = max(1, *(len(mine) for mine in held)) if len(held) > 1 else max(1, len(held[0]))
    copies = np.array([mine + [-1] * (width - len(mine)) for mine in held], dtype=np.int32)
    per_shard = {"min_size": shards, "max_size": shards}
    return Step(
        np.array(draw(st.lists(st.integers(0, 400), min_size=experts, max_size=experts)), dtype=np.int64),
        copies,
        np.array(draw(st.lists(st.floats(0.01, 100), **per_shard))),
        np.array(draw(st.lists(st.floats(0, 1000), **per_shard))),
        np.array(draw(st.lists(st.booleans(), **per_shard)), dtype=bool),
        draw(st.sampled_from([0.0, 1.0, 8.0, 2.5])),
    )


@given(step=steps())
def test_tokens_are_conserved_and_only_copies_that_are_up_get_any(step: Step) -> None:
    before = [part.copy() for part in (step.counts, step.copies, step.seconds, step.waiting, step.up)]
    shares = step.split()
    assert shares.dtype == np.int64
    assert shares.shape == step.copies.shape
    assert (shares >= 0).all()
    usable = (step.copies >= 0) & step.up[step.copies]
    assert not shares[~usable].any()
    assert np.array_equal(shares.sum(axis=1), np.where(usable.any(axis=1), step.counts, 0))
    after = (step.counts, step.copies, step.seconds, step.waiting, step.up)
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert np.array_equal(step.split(), shares), "not reproducible"


def greedy_finish(step: Step) -> float:
    """Greedy least-loaded, written down as it is defined."""
    usable = (step.copies >= 0) & step.up[step.copies]
    choices = usable.sum(axis=1)
    times = np.where(step.up, step.waiting, 0.0)
    heat = [step.counts[e] / choices[e] if choices[e] > 1 else np.inf for e in range(len(choices))]
    for expert in sorted(range(len(choices)), key=lambda e: (-heat[e], e)):
        if step.counts[expert] and choices[expert]:
            shards = np.roll(step.copies[expert][usable[expert]], -(expert % choices[expert]))
            done = times[shards] + (step.counts[expert] + step.opening) * step.seconds[shards]
            times[shards[done.argmin()]] = done.min()
    return float(times.max())


@given(step=steps())
def test_never_worse_than_either_method(step: Step) -> None:
    ours = step.finish(step.split())
    assert ours <= greedy_finish(step) * (1 + 1e-9)
    usable = (step.copies >= 0) & step.up[step.copies]
    fixed = np.where(step.up, step.waiting, 0.0)
    counts, shards = [], []
    for expert in range(len(step.counts)):
        mine = step.copies[expert][usable[expert]].tolist()
        if len(mine) == 1 and step.counts[expert]:
            fixed[mine[0]] += (step.counts[expert] + step.opening) * step.seconds[mine[0]]
        elif mine and step.counts[expert]:
            counts.append(int(step.counts[expert]))
            shards.append(np.roll(mine, -(expert % len(mine))).tolist())
    order = sorted(range(len(counts)), key=lambda i: -counts[i] / len(shards[i]))
    pouring = Pouring([counts[i] for i in order], [shards[i] for i in order], step.seconds.tolist(), step.opening)
    _, times = pouring.poured(fixed.tolist())
    assert ours <= max(times) * 1.005 * (1 + 1e-9), "water-filling is left out only where it wins less than 0.5 %"


@given(step=steps(), data=st.data())
def test_the_names_of_shards_do_not_matter(step: Step, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(step.up)))))  # new name of each shard
    old = np.argsort(order)
    renamed = np.where(step.copies >= 0, order[step.copies], -1).astype(np.int32)
    other = Step(step.counts, renamed, step.seconds[old], step.waiting[old], step.up[old], step.opening)
    assert other.finish(other.split()) == pytest.approx(step.finish(step.split()), rel=1e-6)


def copies_of(experts: int, shards: int, redundancy: int) -> IntArray:
    targets = {shard: Target(str(shard), "node", ()) for shard in range(shards)}
    return build_table(0, (0,), experts, even_slots(1, experts, shards, redundancy), targets).copies[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_numbers_of_experts_hardly_matter(seed: int) -> None:
    """Which of equal copies comes first follows from the expert's number, so only almost."""
    rng = np.random.default_rng(seed)
    copies = copies_of(64, 8, 2)
    counts = rng.multinomial(4096, rng.dirichlet(np.full(64, 0.5)))
    step = Step(counts, copies, rng.uniform(0.5, 2, 8), rng.uniform(0, 100, 8), np.ones(8, dtype=bool), 8.0)
    order = rng.permutation(64)
    other = Step(counts[order], copies[order], step.seconds, step.waiting, step.up, 8.0)
    assert other.finish(other.split()) == pytest.approx(step.finish(step.split()), rel=0.03)


ONE = np.ones(2)
UP = np.ones(2, dtype=bool)
BOTH = np.array([[0, 1]], dtype=np.int32)


def test_the_worked_number_of_the_docstring() -> None:
    copies = np.array([[0, -1], [0, 1]], dtype=np.int32)
    shares = split_tokens(np.array([20, 60]), copies, ONE, np.zeros(2), UP, 8.0)
    assert shares.tolist() == [[20, 0], [16, 44]]


@pytest.mark.parametrize(("tokens", "parts"), [(2, {0, 2}), (15, {0, 15}), (40, {20})])
def test_an_expert_is_not_opened_for_less_than_that_costs(tokens: int, parts: set[int]) -> None:
    shares = split_tokens(np.array([tokens]), BOTH, ONE, np.zeros(2), UP, 8.0)
    assert set(shares[0].tolist()) == parts


def test_of_three_copies_as_many_are_opened_as_pay() -> None:
    three = np.array([[0, 1, 2]], dtype=np.int32)
    shares = split_tokens(np.array([20]), three, np.ones(3), np.zeros(3), np.ones(3, dtype=bool), 8.0)
    assert sorted(shares[0].tolist()) == [0, 10, 10]


def test_greedy_is_taken_where_opening_both_on_both_would_cost_more() -> None:
    """Split, each shard would open both experts and finish at 37 + 16; whole, at 37 + 8."""
    shares = split_tokens(np.array([37, 37]), np.array([[0, 1], [0, 1]], dtype=np.int32), ONE, np.zeros(2), UP, 8.0)
    assert shares.tolist() == [[37, 0], [0, 37]]


def test_without_that_cost_even_two_tokens_are_split() -> None:
    assert split_tokens(np.array([2]), BOTH, ONE, np.zeros(2), UP, 0.0).tolist() == [[1, 1]]


def test_equal_copies_are_taken_in_turn() -> None:
    """Copies of experts that are asked for alone, one after the other, all get warm."""
    copies = np.tile(np.arange(4, dtype=np.int32), (8, 1))
    split = LayerSplit(copies, np.ones(4, dtype=bool))
    first = [split(np.eye(8, dtype=np.int64)[e], np.ones(4), np.zeros(4)).argmax(axis=1)[e] for e in range(8)]
    assert first == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_slow_shard_gets_fewer_and_a_busy_one_waits_its_turn() -> None:
    half_speed = split_tokens(np.array([300]), BOTH, np.array([2.0, 1.0]), np.zeros(2), UP, 0.0)
    assert half_speed.tolist() == [[100, 200]]
    busy = split_tokens(np.array([300]), BOTH, ONE, np.array([100.0, 0.0]), UP, 0.0)
    assert busy.tolist() == [[100, 200]]


def test_a_shard_that_is_down_gets_nothing_and_no_shard_at_all_is_no_error() -> None:
    down = split_tokens(np.array([300]), BOTH, ONE, np.zeros(2), np.array([True, False]), 0.0)
    assert down.tolist() == [[300, 0]]
    assert split_tokens(np.array([300]), BOTH, ONE, np.zeros(2), ~UP, 0.0).tolist() == [[0, 0]]
    nobody = np.zeros(0)
    none = split_tokens(np.array([3]), np.full((1, 1), -1, np.int32), nobody, nobody, np.zeros(0, dtype=bool))
    assert none.tolist() == [[0]]


# -- cost -----------------------------------------------------------------------------------------------------------


def shares_of_shards(cost: ShardCost, true_seconds: Floats, steps: int, rng: np.random.Generator) -> Floats:
    """Part of the rows that each shard got in the last step, when the split follows what was measured."""
    shards = len(true_seconds)
    copies = copies_of(64, shards, 2)
    split = LayerSplit(copies, np.ones(shards, dtype=bool))
    rows = np.zeros(shards)
    for _ in range(steps):
        counts = rng.multinomial(1024, np.full(64, 1 / 64))
        shares = split(counts, cost.seconds_a_row, cost.queue_s, 0.0)
        rows = np.bincount(copies.ravel(), shares.ravel(), minlength=shards)
        noise = rng.uniform(0.9, 1.1, shards)
        cost.observe(rows, rows * true_seconds * noise, np.zeros(shards))
    return rows / rows.sum()


def test_half_the_speed_is_half_the_tokens_within_20_steps_and_back() -> None:
    rng = np.random.default_rng(0)
    cost, usual, slowed = ShardCost(4), np.full(4, 1e-5), np.array([2e-5, 1e-5, 1e-5, 1e-5])
    assert shares_of_shards(cost, usual, 20, rng)[0] == pytest.approx(1 / 4, rel=0.1)
    assert shares_of_shards(cost, slowed, 20, rng)[0] == pytest.approx(1 / 7, rel=0.15)
    assert shares_of_shards(cost, usual, 20, rng)[0] == pytest.approx(1 / 4, rel=0.1)


def test_a_shard_so_slow_that_it_gets_nothing_is_tried_again() -> None:
    cost, others = ShardCost(3), np.array([0.0, 100.0, 100.0])
    cost.observe(np.full(3, 100.0), np.array([100.0, 0.1, 0.1]), np.array([5.0, 0.0, 0.0]))
    slow = [cost.seconds_a_row[0]]
    for _ in range(100):
        cost.observe(others, others * 0.001, np.zeros(3))
        slow.append(cost.seconds_a_row[0])
    assert slow[0] > 500 * 0.001
    assert all(later < earlier for earlier, later in pairwise(slow))
    assert slow[-1] == pytest.approx(0.001, rel=0.01)
    assert cost.queue_s[0] == pytest.approx(0.0, abs=1e-4)


def test_the_worked_number_of_the_cost() -> None:
    cost, rows = ShardCost(3), np.full(3, 100.0)
    for _ in range(200):
        cost.observe(rows, rows * [0.001, 0.001, 0.002], np.zeros(3))
    assert cost.seconds_a_row[2] == pytest.approx(1.95e-3, rel=2e-3)
    idle = np.array([100.0, 100.0, 0.0])
    for _ in range(24):
        cost.observe(idle, idle * 0.001, np.zeros(3))
    assert cost.seconds_a_row[2] == pytest.approx(1.32e-3, rel=3e-3)


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=20),
    seconds=st.tuples(*[st.floats(1e-6, 1.0)] * 3),
)
def test_estimates_stay_between_what_was_measured(
    rows: list[tuple[int, int, int]], seconds: tuple[float, float, float]
) -> None:
    cost = ShardCost(3)
    assert cost.seconds_a_row.tolist() == [1.0, 1.0, 1.0]
    assert cost.queue_s.tolist() == [0.0, 0.0, 0.0]
    for step in rows:
        cost.observe(np.array(step, dtype=np.float64), np.array(step) * seconds, np.array(seconds))
    asked = [second for second, mine in zip(seconds, zip(*rows, strict=True), strict=True) if any(mine)]
    if asked:
        for estimate in (cost.seconds_a_row, cost.queue_s):
            assert min(asked) * 0.999999 <= estimate.min()
            assert estimate.max() <= max(asked) * 1.000001


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(3))
def test_an_observation_that_can_not_be_is_refused_and_changes_nothing(bad: float, place: int) -> None:
    cost = ShardCost(2)
    cost.observe(np.full(2, 10.0), np.array([1.0, 2.0]), np.full(2, 0.5))
    before = (cost.seconds_a_row.tolist(), cost.queue_s.tolist())
    values = [np.array([1.0, 1.0]) for _ in range(3)]
    values[place][1] = bad
    with pytest.raises(ValueError, match="finite and not negative"):
        cost.observe(*values)
    assert (cost.seconds_a_row.tolist(), cost.queue_s.tolist()) == before


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("nan")])
def test_a_half_life_must_be_positive(half_life: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ShardCost(2, half_life)
