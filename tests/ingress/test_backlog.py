"""How long the next request would wait, on a clock of the test's own."""

from __future__ import annotations

import pytest

from expertmesh.deployments.ingress.backlog import Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backlog(clock: Clock) -> Backlog:
    return Backlog(clock)


def serve(backlog: Backlog, clock: Clock, count: int, every_s: float) -> None:
    for _ in range(count):
        clock.now += every_s
        backlog.served()


def test_nobody_knows_at_the_start(backlog: Backlog) -> None:
    for _ in range(50):
        backlog.arrived()
    assert backlog.waiting == 50
    assert backlog.wait_s == 0


def test_those_that_wait_take_their_turns(backlog: Backlog, clock: Clock) -> None:
    for _ in range(30):
        backlog.arrived()
    serve(backlog, clock, 20, 0.5)
    assert backlog.waiting == 10
    assert backlog.wait_s == pytest.approx(11 * 0.5), "the ten before it, and itself"


def test_what_is_computed_together_counts_together(backlog: Backlog, clock: Clock) -> None:
    for _ in range(40):
        backlog.arrived()
    for _ in range(8):
        clock.now += 2.0
        serve(backlog, clock, 4, 0.0)
    assert backlog.wait_s == pytest.approx(9 * 0.5, rel=0.1)


def test_idle_time_is_not_taken_for_slowness(backlog: Backlog, clock: Clock) -> None:
    for _ in range(20):
        backlog.arrived()
        serve(backlog, clock, 1, 0.1)
        clock.now += 2.0
    backlog.arrived()
    assert backlog.wait_s == 0, "nobody had to wait for another"


def test_an_empty_queue_is_never_too_long(backlog: Backlog, clock: Clock) -> None:
    for _ in range(20):
        backlog.arrived()
    serve(backlog, clock, 20, 30.0)
    assert backlog.waiting == 0
    assert backlog.wait_s == 0


def test_those_that_leave_are_waited_for_no_more(backlog: Backlog, clock: Clock) -> None:
    for _ in range(20):
        backlog.arrived()
    serve(backlog, clock, 10, 1.0)
    before = backlog.wait_s
    for _ in range(5):
        backlog.left()
    assert backlog.wait_s == pytest.approx(before - 5)


def test_what_is_long_ago_does_not_count(backlog: Backlog, clock: Clock) -> None:
    for _ in range(30):
        backlog.arrived()
    serve(backlog, clock, 10, 1.0)
    assert backlog.wait_s > 20
    clock.now += 100
    assert backlog.wait_s == 0, "a mesh that was slow once may be asked again"
