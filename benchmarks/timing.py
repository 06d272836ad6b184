"""Small helpers that every benchmark uses."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def median_us(action: Callable[[], object], repeats: int, warm_up: int = 20) -> float:
    """Median time of `action` in microseconds, after some calls that don't count."""
    for _ in range(warm_up):
        action()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        action()
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1000


def alternating(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures each side once a round, in turn, so that a noisy moment hits all of them alike."""
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            results[name].append(measure())
    return results


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of over[i] / under[i], to 3 digits."""
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 3)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
