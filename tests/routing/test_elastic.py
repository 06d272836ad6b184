"""Who takes over which experts, as arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.routing.placement import adopted, even_slots, evened, filled, holders, lent, share, surplus
from expertmesh.routing.placement.elastic import Mask

EXAMPLE = np.array([[[0, 3]], [[1, 2]]], dtype=np.int32)
LOADS = np.array([[40.0, 30.0, 20.0, 10.0]])


def with_added(has: Mask, added: list[tuple[int, int, int]], value: bool = True) -> Mask:
    after = has.copy()
    for at in added:
        assert after[at] != value
        after[at] = value
    return after


def test_the_worked_number() -> None:
    has = holders(EXAMPLE, 4)
    alone = has.copy()
    alone[1] = False
    able = np.array([True, False])
    added, unplaced = adopted(alone, alone, LOADS, redundancy=1, able=able, usual=share(4, 1, 1, 0), most=4)
    assert added == [(0, 0, 1), (0, 0, 2)]
    assert unplaced == []
    both = with_added(has, added)
    dropped = surplus(both, LOADS, redundancy=1, usual=share(4, 2, 1, 0))
    assert sorted(dropped) == [(0, 0, 1), (0, 0, 2)]
    assert sorted(lent(has, LOADS, redundancy=1, usual=share(4, 3, 1, 0))[0].tolist()) == [2, 3]


@pytest.mark.parametrize(
    ("experts", "shards", "redundancy", "spare", "expected"),
    [(24, 2, 1, 0, 12), (24, 4, 1, 0, 6), (10, 3, 2, 0, 7), (24, 2, 1, 3, 15), (8, 1, 2, 0, 8), (8, 0, 1, 0, 8)],
)
def test_shares(experts: int, shards: int, redundancy: int, spare: int, expected: int) -> None:
    assert share(experts, shards, redundancy, spare) == expected


def test_what_nobody_can_take_is_told_once_for_each_copy() -> None:
    has = np.zeros((2, 1, 4), dtype=bool)
    has[0, 0, :2] = True
    able = np.array([True, False])
    added, unplaced = adopted(has, has, LOADS, redundancy=1, able=able, usual=2, most=3)
    assert added == [(0, 0, 2)]
    assert unplaced == [(0, 3)]
    added, unplaced = adopted(has, has, LOADS, redundancy=1, able=np.zeros(2, dtype=bool), usual=2, most=3)
    assert (added, unplaced) == ([], [(0, 2), (0, 3)])


def test_a_copy_that_is_about_to_go_does_not_count_but_is_not_loaded_twice() -> None:
    has = holders(EXAMPLE, 4)
    keeps = has.copy()
    keeps[0, 0, 0] = False
    everyone = np.ones(2, dtype=bool)
    added, _ = adopted(has, keeps, LOADS, redundancy=1, able=everyone, usual=2, most=4)
    assert added == [(1, 0, 0)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shards=st.integers(2, 7),
    experts=st.integers(2, 20),
    redundancy=st.integers(1, 3),
    idle=st.booleans(),
)
def test_dying_and_coming(seed: int, shards: int, experts: int, redundancy: int, idle: bool) -> None:
    rng = np.random.default_rng(seed)
    redundancy = min(redundancy, shards - 1)
    layers = 2
    has = holders(even_slots(layers, experts, shards, redundancy), experts)
    loads = np.zeros((layers, experts)) if idle else rng.lognormal(0, 2, (layers, experts))
    dead = int(rng.integers(shards))
    alive = np.ones(shards, dtype=bool)
    alive[dead] = False
    left = has & alive[:, None, None]
    usual = share(experts, shards - 1, redundancy, 0)
    added, unplaced = adopted(left, left, loads, redundancy=redundancy, able=alive, usual=usual, most=experts)
    whole = with_added(left, added)
    assert unplaced == []
    assert (whole.sum(axis=0) == redundancy).all(), "no copy more than is wanting"
    assert not whole[dead].any()
    if redundancy == 1:
        assert (whole.sum(axis=2) <= usual).all()
    # One that comes takes its share, and the others can give up theirs.
    room = share(experts, shards, redundancy, 0)
    taken = lent(whole[alive], loads, redundancy=redundancy, usual=room)
    for layer in range(layers):
        mine = taken[layer][taken[layer] >= 0].tolist()
        assert len(set(mine)) == len(mine) <= room
        whole[dead, layer, mine] = True
    for at in surplus(whole, loads, redundancy=redundancy, usual=room):
        assert whole[:, at[1], at[2]].sum() > redundancy
        whole[at] = False
    assert (whole.sum(axis=0) >= redundancy).all()
    # Where a shard still holds more than its share, copies elsewhere make room for giving some away.
    for _ in range(layers * experts * redundancy):
        more = evened(whole, loads, able=np.ones(shards, dtype=bool), usual=room)
        if not more:
            break
        whole = with_added(whole, more)
        dropped = surplus(whole, loads, redundancy=redundancy, usual=room)
        assert dropped
        whole = with_added(whole, dropped, value=False)
        assert (whole.sum(axis=0) >= redundancy).all()
    assert not more
    if redundancy == 1:
        assert (whole.sum(axis=2) <= room).all()


def test_a_newcomer_gets_an_even_part_of_the_load() -> None:
    rng = np.random.default_rng(5)
    layers, experts, shards = 6, 64, 4
    loads = rng.lognormal(0, 1, (layers, experts))
    has = holders(even_slots(layers, experts, shards, 1), experts)
    taken = lent(has, loads, redundancy=1, usual=share(experts, shards + 1, 1, 0))
    got = np.array([loads[layer, taken[layer][taken[layer] >= 0]].sum() for layer in range(layers)])
    even = loads.sum(axis=1) / (shards + 1)
    np.testing.assert_allclose(got / even, 1.0, atol=0.1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shards=st.integers(1, 6), experts=st.integers(1, 16), usual=st.integers(1, 16))
def test_empty_slots_are_filled(seed: int, shards: int, experts: int, usual: int) -> None:
    rng = np.random.default_rng(seed)
    has = rng.random((shards, 2, experts)) < 0.3
    able = rng.random(shards) < 0.8
    whole = with_added(has, filled(has, rng.lognormal(0, 1, (2, experts)), able=able, usual=usual))
    assert (whole[able].sum(axis=2) == np.maximum(has[able].sum(axis=2), min(usual, experts))).all()
    assert (whole[~able] == has[~able]).all()


def test_the_hottest_experts_get_more_copies() -> None:
    has = holders(EXAMPLE, 4)
    assert filled(has, LOADS, able=np.ones(2, dtype=bool), usual=3) == [(1, 0, 0), (0, 0, 1)]


def test_a_model_without_experts_needs_nothing() -> None:
    has, loads, able = np.zeros((1, 2, 0), dtype=bool), np.zeros((2, 0)), np.ones(1, dtype=bool)
    assert adopted(has, has, loads, redundancy=1, able=able, usual=0, most=0) == ([], [])
    assert surplus(has, loads, redundancy=1, usual=0) == []
    assert filled(has, loads, able=able, usual=0) == []
