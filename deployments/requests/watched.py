"""What the request router decided about requests that somebody watches: the ingress does for those that it traces.

Router and ingress are in one process, on two threads; entries are made and removed by the ingress alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest

from expertmesh.routing.requests import Rank


@dataclass(slots=True)
class Choice:
    """Filled in by the router when it has chosen; as it was before, where Serve's own router chooses."""

    replica: str = ""
    at_ns: int = 0
    """Since the epoch; 0: not chosen yet."""
    blocks: int = 0
    """Whole blocks of the prompt."""
    ranks: Sequence[Rank] = field(default=())
    """All candidates at that moment, the best first; one that was full is passed over."""

    @property
    def expected_hit_blocks(self) -> int:
        """Blocks of the prompt that the replica has, as far as is known."""
        return next((rank.held for rank in self.ranks if rank.replica == self.replica), 0)


_watched: dict[str, Choice] = {}


def watch(request_id: str) -> Choice:
    """From now on the router tells about this request. `unwatch` must follow."""
    choice = _watched[request_id] = Choice()
    return choice


def unwatch(request_id: str) -> None:
    """It is of no interest any more."""
    _watched.pop(request_id, None)


def watched(arguments: Sequence[object]) -> Choice | None:
    """Where to tell about a call with these arguments; None if nobody watches."""
    if not _watched or not arguments or not isinstance(arguments[0], EngineCoreRequest):
        return None
    return _watched.get(arguments[0].request_id)


def tell(choice: Choice, replica: str, blocks: int, ranks: Sequence[Rank]) -> None:
    """The router has chosen; again, if the replica refused the request."""
    choice.replica, choice.blocks, choice.ranks = replica, blocks, ranks
    choice.at_ns = time.time_ns()
