"""Breaker, gate and write queue: pure, with the clock as an argument."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.kv_store.breaker import BreakerState, CircuitBreaker
from expertmesh.kv_store.gate import BreakEvenGate, TimeByLength
from expertmesh.kv_store.write_queue import WriteQueue


def test_a_breaker_opens_at_once_and_one_probe_goes_out() -> None:
    breaker = CircuitBreaker(cooldown_s=2)
    assert breaker.allows()
    assert breaker.probe_in_s(0) is None
    breaker.failed(10)
    assert not breaker.allows()
    assert breaker.probe_in_s(11.5) == 0.5
    assert not breaker.probe(11.9)
    assert breaker.probe(12)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows(), "a request is no probe"
    assert not breaker.probe(13), "one probe at a time"
    breaker.probed()
    assert breaker.allows()
    assert breaker.opened == 1


def test_a_cooldown_doubles_until_real_traffic_succeeds() -> None:
    breaker = CircuitBreaker(cooldown_s=1, longest_cooldown_s=5)
    now, waits = 0.0, []
    for _ in range(5):
        breaker.failed(now)
        wait = breaker.probe_in_s(now)
        assert wait is not None
        waits.append(wait)
        now += wait
        assert breaker.probe(now)
    assert waits == [1, 2, 4, 5, 5]
    breaker.probed()
    breaker.failed(now)
    assert breaker.probe_in_s(now) == 5, "a probe that succeeds is no proof"
    assert breaker.probe(now + 5)
    breaker.probed()
    breaker.succeeded()
    breaker.failed(now)
    assert breaker.probe_in_s(now) == 1


def test_what_ends_late_changes_nothing() -> None:
    breaker = CircuitBreaker(cooldown_s=1)
    breaker.failed(0)
    breaker.failed(0.9)
    breaker.succeeded()
    breaker.probed()
    assert breaker.probe_in_s(0.9) == pytest.approx(0.1)
    assert not breaker.allows()


@given(st.lists(st.sampled_from(["failed", "succeeded", "probe", "probed", "wait"])))
def test_an_open_breaker_always_has_a_way_back(steps: list[str]) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for step in steps:
        match step:
            case "failed":
                breaker.failed(now)
            case "probe":
                breaker.probe(now)
            case "wait":
                now += 3
            case _:
                getattr(breaker, step)()
    if breaker.state is BreakerState.OPEN:
        due = breaker.probe_in_s(now)
        assert due is not None
        assert due <= breaker.longest_cooldown_s
        assert breaker.probe(now + due)
    if breaker.state is BreakerState.HALF_OPEN:
        breaker.probed()
    assert breaker.allows()


def test_times_between_beyond_and_below_what_was_measured() -> None:
    times = TimeByLength()
    assert times.expected_s(100) is None
    times.add(1000, 1.0)
    assert times.expected_s(1000) == 1.0
    assert times.expected_s(4000) == 4.0
    assert times.expected_s(10) == 1.0
    times.add(100, 0.1)
    times.add(3000, 5.0)
    assert times.expected_s(2000) == 3.0
    assert times.expected_s(550) == pytest.approx(0.55)


def test_times_follow_what_changes() -> None:
    times = TimeByLength()
    times.add(1000, 1.0)
    for _ in range(30):
        times.add(1000, 3.0)
    assert times.expected_s(1000) == pytest.approx(3.0, rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0.001, 100)), min_size=1), st.integers(1, 200_000))
def test_a_time_is_never_beyond_reason(measured: list[tuple[int, float]], tokens: int) -> None:
    times = TimeByLength()
    for length, seconds in measured:
        times.add(length, seconds)
    expected = times.expected_s(tokens)
    assert expected is not None
    most = max(seconds for _, seconds in measured)
    longest = max(length for length, _ in measured)
    assert min(seconds for _, seconds in measured) * 0.999 <= expected <= most * max(tokens / longest * 2, 1) * 1.001


def test_a_gate_is_open_until_both_sides_are_known() -> None:
    gate = BreakEvenGate()
    assert gate.worthwhile(1000, 0)
    assert gate.budget_s(1000) is None
    gate.fetched(1000, 100.0)
    assert gate.worthwhile(1000, 0)
    gate.computed(1000, 1.0)
    assert not gate.worthwhile(1000, 0)
    assert gate.budget_s(2000) == 2.0


def test_the_first_block_tells_whether_a_store_has_become_slow() -> None:
    gate = BreakEvenGate()
    gate.computed(1024, 2.4)
    assert gate.first_block_s(1024, 8, 2.4, 0.1) == pytest.approx(0.3), "its part of computing"
    gate.fetched(1024, 0.04)
    assert gate.first_block_s(1024, 8, 2.4, 0.1) == 0.1, "blocks took 5 ms"
    for _ in range(30):
        gate.fetched(1024, 0.2)
    assert gate.first_block_s(1024, 8, 2.4, 0.1) == pytest.approx(0.2, rel=0.01), "8 times 25 ms"
    for _ in range(30):
        gate.fetched(1024, 2.0)
    assert gate.first_block_s(1024, 8, 2.4, 0.1) == pytest.approx(0.3)
    assert gate.first_block_s(1024, 8, 0.05, 0.1) == 0.05, "never more than the whole fetch may take"


def test_a_gate_decides_by_length() -> None:
    gate = BreakEvenGate()
    for tokens, fetch, compute in ((128, 0.2, 0.05), (4096, 0.4, 3.0)):
        gate.fetched(tokens, fetch)
        gate.computed(tokens, compute)
    assert not gate.worthwhile(128, 0)
    assert gate.worthwhile(4096, 0)
    assert gate.worthwhile(20_000, 0)


def test_a_closed_gate_lets_a_probe_through_and_opens_when_the_store_got_faster() -> None:
    gate = BreakEvenGate(probe_interval_s=10)
    gate.computed(1000, 1.0)
    gate.fetched(1000, 2.0)
    answers = [gate.worthwhile(1000, now) for now in (0, 5, 9.9, 10, 11, 19, 20)]
    assert answers == [False, False, False, True, False, False, True]
    gate.fetched(1000, 0.1)
    assert gate.worthwhile(1000, 21)
    assert gate.worthwhile(1000, 22)


def test_one_fetch_that_was_given_up_closes_a_gate() -> None:
    gate = BreakEvenGate(probe_interval_s=10)
    gate.computed(1000, 1.0)
    for _ in range(10):
        gate.fetched(1000, 0.1)
    gate.gave_up(1000, 2.0)
    assert not gate.worthwhile(1000, 0)
    gate.computed(1000, 1.0)
    assert gate.worthwhile(1000, 10)


def test_a_full_queue_drops_the_new_job_and_counts_what_is_under_way() -> None:
    queue: WriteQueue[str] = WriteQueue(100)
    assert queue.offer("a", 60)
    assert not queue.offer("b", 41)
    assert queue.offer("c", 40)
    assert queue.take() == ("a", 60)
    assert not queue.offer("d", 1), "what is being written still holds its memory"
    queue.release(60)
    assert queue.offer("d", 60)
    assert queue.pending_bytes == 100
    assert [queue.take(), queue.take()] == [("c", 40), ("d", 60)]


def test_a_closed_queue_ends_those_who_wait() -> None:
    queue: WriteQueue[str] = WriteQueue(100)
    got: list[object] = []
    waiting = threading.Thread(target=lambda: got.append(queue.take()))
    waiting.start()
    assert queue.close() == []
    waiting.join()
    assert got == [None]
    assert not queue.offer("a", 1)


def test_a_closed_queue_gives_back_what_waits() -> None:
    queue: WriteQueue[str] = WriteQueue(100)
    queue.offer("a", 1)
    queue.offer("b", 2)
    assert queue.close() == ["a", "b"]
    assert queue.take() is None
    assert queue.pending_bytes == 0
