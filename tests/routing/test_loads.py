"""Decayed loads, and telling a shift of traffic from noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.routing.placement import Loads

Counts = np.ndarray[Any, np.dtype[np.int64]]

counts = st.lists(st.integers(0, 10_000), min_size=6, max_size=6).map(lambda each: np.array(each).reshape(2, 3))


@given(window=counts, seconds=st.floats(0.01, 1000), half_life=st.floats(0.1, 1e4))
def test_one_window_is_its_own_rate(window: Counts, seconds: float, half_life: float) -> None:
    loads = Loads.none(2, 3).after(window, seconds, half_life)
    assert loads.rows_a_second == pytest.approx(window / seconds)


@given(windows=st.lists(counts, min_size=2, max_size=6), seconds=st.floats(0.1, 100))
def test_a_load_lies_between_the_rates_of_its_windows(windows: list[Counts], seconds: float) -> None:
    loads = Loads.none(2, 3)
    for window in windows:
        loads = loads.after(window, seconds, 30.0)
    rates = np.array(windows) / seconds
    assert (loads.rows_a_second >= rates.min(axis=0) * (1 - 1e-9)).all()
    assert (loads.rows_a_second <= rates.max(axis=0) * (1 + 1e-9)).all()


def test_a_window_one_half_life_old_counts_half() -> None:
    old, new = np.array([[80, 0]]), np.array([[0, 80]])
    loads = Loads.none(1, 2).after(old, 10.0, 10.0).after(new, 10.0, 10.0)
    assert loads.tokens.tolist() == [[40.0, 80.0]]
    assert loads.rows_a_second == pytest.approx(np.array([[40 / 15, 80 / 15]]))


def test_an_update_leaves_the_loads_before_as_they_were() -> None:
    before = Loads.none(1, 2).after(np.array([[3, 4]]), 1.0, 10.0)
    before.after(np.array([[30, 40]]), 1.0, 10.0)
    assert before.tokens.tolist() == [[3.0, 4.0]]


def test_before_the_first_window_there_is_no_load_and_no_shift() -> None:
    loads = Loads.none(2, 3)
    assert not loads.rows_a_second.any()
    assert not loads.shift(np.full((2, 3), 100)).found().any()


def test_the_worked_number_of_the_docstring() -> None:
    loads = Loads.none(1, 2).after(np.array([[300, 100]]), 1.0, 10.0)
    shift = loads.shift(np.array([[60, 40]]))
    assert shift.distance == pytest.approx(0.15)
    assert shift.noise == pytest.approx(0.040, abs=5e-4)
    assert shift.found().tolist() == [True]


@pytest.mark.parametrize("tokens", [500, 20_000])
def test_the_noise_is_what_sampling_gives(tokens: int) -> None:
    """Windows of one mix: the distance is the noise on average, and never counts as a shift."""
    rng = np.random.default_rng(tokens)
    shares = rng.dirichlet(np.full(64, 0.5), 200)
    loads = Loads.none(200, 64)
    for _ in range(4):
        loads = loads.after(rng.multinomial(tokens, shares), 10.0, 20.0)
    shift = loads.shift(rng.multinomial(tokens, shares))
    assert shift.distance.mean() == pytest.approx(shift.noise.mean(), rel=0.05)
    assert not shift.found().any()


def test_another_subject_is_found_in_the_layers_where_it_shows() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(64, 0.5), 20)
    loads = Loads.none(20, 64).after(rng.multinomial(20_000, shares), 10.0, 20.0)
    turned = np.concatenate([np.roll(shares[:10], 7, axis=1), shares[10:]])
    assert loads.shift(rng.multinomial(2000, turned)).found().tolist() == [True] * 10 + [False] * 10


def test_a_drift_too_small_to_act_on_is_no_shift_however_sure() -> None:
    shares = np.full((1, 2), 0.5)
    loads = Loads.none(1, 2).after((shares * 1e9).astype(np.int64), 10.0, 20.0)
    shift = loads.shift(np.array([[520_000_000, 480_000_000]]))
    assert shift.distance > 100 * shift.noise
    assert not shift.found().any()


@given(before=counts, now=counts, data=st.data())
def test_a_shift_does_not_depend_on_the_numbers_of_experts(before: Counts, now: Counts, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(3))))
    shift = Loads.none(2, 3).after(before, 1.0, 5.0).shift(now)
    other = Loads.none(2, 3).after(before[:, order], 1.0, 5.0).shift(now[:, order])
    assert other.distance == pytest.approx(shift.distance)
    assert other.noise == pytest.approx(shift.noise)
    assert ((shift.distance >= 0) & (shift.distance <= 1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("window", "seconds", "half_life", "what"),
    [
        (np.zeros((2, 3), dtype=np.int64), 1.0, 1.0, "shape"),
        (np.array([[1, -1]]), 1.0, 1.0, "none negative"),
        (np.array([[1, 1]]), 0.0, 1.0, "positive"),
        (np.array([[1, 1]]), 1.0, 0.0, "positive"),
        (np.array([[1, 1]]), float("nan"), 1.0, "positive"),
    ],
)
def test_a_window_that_can_not_be_is_refused(window: Counts, seconds: float, half_life: float, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Loads.none(1, 2).after(window, seconds, half_life)
