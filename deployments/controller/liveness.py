"""Who is taken for dead: late is not dead. Pure: times are given.

Where cores or the network are short all heartbeats come late. Whoever takes the late for dead then has others load
their experts, which makes all later still. What counts is how late a member is beside the others: an accrual detector
with the median of the others as its estimate (cf. Hayashibara et al., "The phi accrual failure detector", SRDS 2004).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median_low

REMEMBERED_GAPS = 3
"""Times between heartbeats that are to be kept of each member."""
_MOST_PATIENCE = 12.0


@dataclass(frozen=True, slots=True)
class Sign:
    """What is known of a member's life."""

    silence_s: float
    """Since its last heartbeat."""
    gaps_s: Sequence[float] = ()
    """Between its last heartbeats."""
    interval_s: float = inf
    """Usually between two; for all of them infinite if nobody is to be waited for longer."""
    suspected: bool = False
    """A connection to it broke."""
    loads: bool = False
    """It loads experts: building modules keeps a process from its heartbeats."""


def silent(signs: Mapping[str, Sign], timeout_s: float, suspect_s: float) -> list[str]:
    """Members that are not heard of in time, for `timeout_s`, and if suspected for `suspect_s`: longer where all are
    late, and where one that nobody suspects loads experts."""
    names = []
    for name, sign in signs.items():
        usual_s = suspect_s if sign.suspected else timeout_s
        if sign.silence_s <= usual_s:
            continue
        if sign.loads and not sign.suspected:
            longer = _MOST_PATIENCE
        else:
            longer = patience((other for its, other in signs.items() if its != name), timeout_s)
        if sign.silence_s > usual_s * longer:
            names.append(name)
    return names


def patience(others: Iterable[Sign], timeout_s: float) -> float:
    """How many times longer than usual to wait for a member: the others' median gap over their interval, 1 to 12.

    A silence that goes on counts as a gap, up to the timeout, so that one who was held up himself takes nobody for
    dead; but not that of a suspected member, which may be dead.
    """
    late = []
    for sign in others:
        still_open_s = 0.0 if sign.suspected else min(sign.silence_s, timeout_s)
        late.append(max(still_open_s, *sign.gaps_s, 0.0) / sign.interval_s)
    return min(max(median_low(late), 1.0), _MOST_PATIENCE) if late else 1.0
