"""The static placement and the routing table: pure functions, so properties."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import WireError
from expertmesh.routing.placement import RoutingTable, Target, build_table, even_slots, slots_per_shard


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(layers, experts, shards, redundancy); shards need not divide anything."""
    shards = draw(st.integers(1, 9))
    return draw(st.integers(1, 5)), draw(st.integers(1, 40)), shards, draw(st.integers(1, shards))


def target(index: int) -> Target:
    return Target(f"shard-{index}", "node", (f"unix:@{index}", f"tcp:10.0.0.1:{index + 1}"))


@given(placement=placements())
def test_every_expert_is_on_redundancy_shards_evenly(placement: tuple[int, int, int, int]) -> None:
    layers, experts, shards, redundancy = placement
    slots = even_slots(*placement)
    assert slots.shape == (shards, layers, slots_per_shard(experts, shards, redundancy))
    for layer in range(layers):
        held = [[e for e in slots[shard, layer].tolist() if e >= 0] for shard in range(shards)]
        assert all(len(set(mine)) == len(mine) for mine in held), "a shard holds an expert twice"
        copies = Counter(e for mine in held for e in mine)
        assert copies == dict.fromkeys(range(experts), redundancy)
        sizes = [len(mine) for mine in held]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == slots.shape[2], "a slot that no shard ever needs"


@given(placement=placements())
def test_the_fullest_shard_is_another_in_the_next_layer(placement: tuple[int, int, int, int]) -> None:
    layers, experts, shards, redundancy = placement
    in_layers = (even_slots(*placement) >= 0).sum(axis=2).T  # [layers, shards]
    assert all((np.roll(in_layers[0], layer) == in_layers[layer]).all() for layer in range(layers))
    totals = in_layers.sum(axis=0)
    if layers % shards == 0:
        assert totals.min() == totals.max() == layers * experts * redundancy // shards


def test_the_worked_number_of_the_docstring() -> None:
    slots = even_slots(2, 10, 3, 2)
    assert slots.shape == (3, 2, 7)
    held = [set(slots[shard, 0].tolist()) - {-1} for shard in range(3)]
    assert [{s for s in range(3) if e in held[s]} for e in range(3)] == [{0, 1}, {2, 0}, {1, 2}]


@pytest.mark.parametrize("redundancy", [0, -1, 4])
def test_redundancy_that_the_shards_can_not_give_is_refused(redundancy: int) -> None:
    with pytest.raises(ValueError, match=f"redundancy {redundancy}; allowed: 1 to 3"):
        even_slots(2, 8, 3, redundancy)


@given(placement=placements(), data=st.data())
def test_the_table_says_what_the_slots_of_the_ready_shards_say(
    placement: tuple[int, int, int, int], data: st.DataObject
) -> None:
    layers, experts, shards, _ = placement
    slots = even_slots(*placement)
    ready = data.draw(st.sets(st.integers(0, shards - 1)))
    numbers = tuple(3 * i + 1 for i in range(layers))
    table = build_table(7, numbers, experts, slots, {i: target(i) for i in ready})

    assert table.epoch == 7
    assert table.layers == numbers
    assert table.layer_index == {number: i for i, number in enumerate(numbers)}
    assert table.targets == tuple(target(i) for i in sorted(ready))
    assert table.num_experts == experts
    missing, least = 0, shards
    for layer in range(layers):
        for expert in range(experts):
            copies = table.copies[layer, expert].tolist()
            said = [c for c in copies if c >= 0]
            assert copies == said + [-1] * (len(copies) - len(said)), "padding only at the end"
            holders = [position for position, i in enumerate(sorted(ready)) if expert in slots[i, layer]]
            assert said == holders
            missing += not holders
            least = min(least, len(holders))
    assert table.missing == missing
    assert table.redundancy == least


def test_what_is_missing_counts_logical_experts() -> None:
    slots = even_slots(2, 8, 4, 2)
    everyone = {i: target(i) for i in range(4)}
    full = build_table(1, (0, 1), 8, slots, everyone)
    assert (full.missing, full.redundancy) == (0, 2)
    one_away = build_table(2, (0, 1), 8, slots, {i: everyone[i] for i in (0, 1, 2)})
    assert (one_away.missing, one_away.redundancy) == (0, 1)
    none = build_table(3, (0, 1), 8, slots, {})
    assert (none.missing, none.redundancy) == (16, 0)


@given(placement=placements(), data=st.data())
def test_json_round_trip(placement: tuple[int, int, int, int], data: st.DataObject) -> None:
    layers, experts, shards, _ = placement
    ready = data.draw(st.sets(st.integers(0, shards - 1)))
    epoch = data.draw(st.integers(0, 2**63))
    targets = {i: target(i) for i in ready}
    table = build_table(epoch, tuple(range(layers)), experts, even_slots(*placement), targets)
    text = table.to_json()
    assert "\n" not in text
    for form in (text, text.encode()):
        read = RoutingTable.from_json(form)
        assert (read.epoch, read.layers, read.targets) == (table.epoch, table.layers, table.targets)
        assert read.copies.dtype == np.int32
        assert np.array_equal(read.copies, table.copies)


def as_data() -> dict[str, Any]:
    slots = even_slots(1, 2, 2, 1)
    data: dict[str, Any] = json.loads(build_table(1, (0,), 2, slots, {0: target(0), 1: target(1)}).to_json())
    return data


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[]", '"x"', "{}", b"\xff\xfe", "[" * 100_000, '{"targets": [1]}', '{"targets": "ab"}'],
)
def test_text_that_is_no_table_is_refused(text: str | bytes) -> None:
    with pytest.raises(WireError, match="not a routing table"):
        RoutingTable.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"copies": [0, 2]},
        {"copies": [0, -2]},
        {"copies": [0, 2**40]},
        {"copies": [0, "x"]},
        {"copies": [0, None]},
        {"copies": None},
        {"copies": [0]},
        {"shape": [2, 1]},
        {"shape": [1, 2]},
        {"shape": [2, 1, 1]},
        {"shape": [1, 2, 1, 1]},
        {"shape": None},
        {"shape": ["1", 2, 1]},
        {"epoch": "first"},
        {"epoch": None},
        {"epoch": float("inf")},
        {"layers": [0, 1]},
        {"layers": []},
        {"layers": 0},
        {"layers": ["first"]},
        {"targets": []},
        {"targets": None},
        {"targets": [{"shard": "a", "node": "n"}, {"shard": "b", "node": "n"}]},
        {"targets": [{"shard": "a", "node": "n", "addresses": None}, {"shard": "b", "node": "n", "addresses": []}]},
    ],
)
def test_a_table_with_a_field_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    assert RoutingTable.from_json(json.dumps(as_data())).missing == 0
    with pytest.raises(WireError, match="routing table"):
        RoutingTable.from_json(json.dumps({**as_data(), **changes}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(as_data())), value=JSON)
def test_a_table_with_anything_in_a_field_is_read_or_refused(field: str, value: Any) -> None:
    try:
        table = RoutingTable.from_json(json.dumps({**as_data(), field: value}))
    except WireError:
        return
    assert table.copies.shape[0] == len(table.layers)
    assert table.copies.min(initial=0) >= -1
    assert table.copies.max(initial=-1) < len(table.targets)
