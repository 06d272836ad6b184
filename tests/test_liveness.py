"""Late is not dead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.deployments.controller.liveness import Sign, patience, silent

TIMEOUT_S, SUSPECT_S = 5.0, 2.0


def signs(*silences_s: float, gap_s: float = 1.0) -> dict[str, Sign]:
    return {f"m{i}": Sign(silence_s, (gap_s,) * 3, 1.0) for i, silence_s in enumerate(silences_s)}


def dead(of: dict[str, Sign]) -> list[str]:
    return silent(of, TIMEOUT_S, SUSPECT_S)


def test_among_punctual_ones_the_timeout_counts() -> None:
    assert dead(signs(5.0, 0.5, 0.5, 0.5)) == []
    assert dead(signs(5.1, 0.5, 0.5, 0.5)) == ["m0"]


def test_among_late_ones_it_is_as_many_times_longer() -> None:
    assert dead(signs(19.9, 0.5, 0.5, 0.5, gap_s=4.0)) == []
    assert dead(signs(20.1, 0.5, 0.5, 0.5, gap_s=4.0)) == ["m0"]


def test_patience_has_an_end() -> None:
    assert dead(signs(60.1, 0.5, 0.5, 0.5, gap_s=100.0)) == ["m0"]


def test_nobody_is_dead_for_one_who_was_held_up() -> None:
    assert dead(signs(20.0, 20.0, 20.0)) == []


def test_half_may_die_at_once() -> None:
    assert dead(signs(5.5, 5.5, 0.5, 0.5)) == ["m0", "m1"]


def test_all_but_one_may_where_their_connections_broke() -> None:
    of = {name: Sign(2.5, (1.0,), 1.0, suspected=True) for name in "abc"}
    assert dead({**of, "d": Sign(0.5, (1.0,), 1.0)}) == ["a", "b", "c"]


def test_one_that_loads_has_time_unless_a_connection_broke() -> None:
    of = signs(0.5, 0.5, 0.5)
    assert dead({**of, "l": Sign(59.0, (1.0,), 1.0, loads=True)}) == []
    assert dead({**of, "l": Sign(61.0, (1.0,), 1.0, loads=True)}) == ["l"]
    assert dead({**of, "l": Sign(2.5, (1.0,), 1.0, suspected=True, loads=True)}) == ["l"]


def test_without_intervals_nobody_is_waited_for_longer() -> None:
    assert dead({"a": Sign(5.1, (30.0,)), "b": Sign(1.0, (30.0,)), "c": Sign(1.0, (30.0,))}) == ["a"]


@pytest.mark.parametrize("count", [0, 1])
def test_alone_and_of_two(count: int) -> None:
    assert dead(signs(5.1, *[0.5] * count)) == ["m0"]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.booleans())))
def test_patience_has_bounds(others: list[tuple[float, float, bool]]) -> None:
    assert 1.0 <= patience([Sign(s, (gap,), 1.0, suspected) for s, gap, suspected in others], TIMEOUT_S) <= 12.0
