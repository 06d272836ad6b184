"""Do requests go where their prefix is, without one replica getting all of them?

    python -m benchmarks.prefix_routing --trace FILE.jsonl [--replicas 8] [--blocks 8000]
    python -m benchmarks.prefix_routing --synthetic conversations|documents|tools [--seed N]

Replays a trace in Mooncake's format through the production ranking (`expertmesh.routing.requests`) and through four
other policies. The engine model: a replica computes prompts one after the other in the order in which they came (FIFO
prefill, no decoding), only the blocks that it doesn't hold, at a constant speed; it keeps `--blocks` blocks of 512
tokens, drops the least recently used, last blocks of a prompt first, and tells of both by KV events. The speed is such
that the replicas would be busy 70 % of the trace's time if each block were computed once.

* `hit`: blocks of prompts that the chosen replica held when it came to the prompt / all blocks of prompts.
* `possible_hit`: the same of a single endless cache, which finds a prefix as soon as it was asked for once.
* `imbalance`: load of the most loaded replica / mean load; a replica's load is the time that it computes.
* `wait`: from a request's arrival to the end of its prefill, so queueing plus compute, in seconds.

The policies, all with the same knowledge of what replicas hold (events, and requests under way):

* `random`: any replica. `least_loaded`: the fewest requests in flight.
* `affinity`: the longest held prefix; if nobody holds any of it, the replica with the fewest blocks.
* `affinity_fallback`: affinity, but least loaded while some replica has more than 1.5 times the mean number of requests
  in flight (the relative threshold of SGLang's cache-aware policy, without the absolute one of 64 requests beside it).
* `ours`: `ReplicaChoice`.

Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.traces import KINDS, TracedRequest, possible_hits, read_trace, synthetic_trace
from expertmesh.routing.requests import Event, EventBatch, PrefixIndex, Removed, ReplicaChoice, Stored

USE_AT_PERFECT_REUSE = 0.7
FALLBACK_FACTOR = 1.5


class Policy(Protocol):
    """Chooses a replica (its number) for each request, and hears of what happens then."""

    def choose(self, request: int, blocks: tuple[int, ...]) -> int:
        """The replica that takes the request, from the moment of the call on."""

    def done(self, request: int, replica: int) -> None:
        """The request's prefill is over."""

    def events(self, replica: int, events: tuple[Event, ...]) -> None:
        """What changed in the replica's cache."""


class RandomPolicy:
    """Any replica."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._rng = random.Random(0)

    def choose(self, request: int, blocks: tuple[int, ...]) -> int:
        return self._rng.randrange(self._replicas)

    def done(self, request: int, replica: int) -> None: ...

    def events(self, replica: int, events: tuple[Event, ...]) -> None: ...


class LeastLoadedPolicy(RandomPolicy):
    """The fewest requests in flight; any of several."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self.in_flight = [0] * replicas

    def least_loaded(self) -> int:
        """The replica with the fewest requests in flight."""
        least = min(self.in_flight)
        return self._rng.choice([i for i, n in enumerate(self.in_flight) if n == least])

    def choose(self, request: int, blocks: tuple[int, ...]) -> int:
        replica = self.least_loaded()
        self.in_flight[replica] += 1
        return replica

    def done(self, request: int, replica: int) -> None:
        self.in_flight[replica] -= 1


class AffinityPolicy(LeastLoadedPolicy):
    """The longest held prefix; least loaded instead while the load is more uneven than `factor` allows."""

    def __init__(self, replicas: int, factor: float = float("inf")) -> None:
        super().__init__(replicas)
        self._factor = factor
        self._index = PrefixIndex()
        self._blocks: dict[int, tuple[int, ...]] = {}
        for replica in range(replicas):
            self._index.add(str(replica))

    def choose(self, request: int, blocks: tuple[int, ...]) -> int:
        if max(self.in_flight) > self._factor * sum(self.in_flight) / len(self.in_flight):
            replica = self.least_loaded()
        else:
            held = self._index.match(blocks)
            replica = max(range(self._replicas), key=lambda i: (held[str(i)], -self._index.size(str(i))))
        self.in_flight[replica] += 1
        self._blocks[request] = blocks
        self._index.expect(str(replica), blocks)
        return replica

    def done(self, request: int, replica: int) -> None:
        super().done(request, replica)
        self._index.unexpect(str(replica), self._blocks.pop(request))

    def events(self, replica: int, events: tuple[Event, ...]) -> None:
        for event in events:
            self._index.apply(str(replica), event)


class OurPolicy:
    """The production ranking."""

    def __init__(self, replicas: int) -> None:
        self._choice = ReplicaChoice()
        self._sequences = [0] * replicas
        for replica in range(replicas):
            self._choice.add(str(replica))

    def choose(self, request: int, blocks: tuple[int, ...]) -> int:
        replica = self._choice.rank(blocks)[0].replica
        self._choice.routed(str(request), replica, blocks)
        return int(replica)

    def done(self, request: int, replica: int) -> None:
        self._choice.finished(str(request))

    def events(self, replica: int, events: tuple[Event, ...]) -> None:
        self._choice.apply(str(replica), EventBatch(self._sequences[replica], events))
        self._sequences[replica] += 1


POLICIES: dict[str, Callable[[int], Policy]] = {
    "ours": OurPolicy,
    "random": RandomPolicy,
    "least_loaded": LeastLoadedPolicy,
    "affinity": AffinityPolicy,
    "affinity_fallback": lambda replicas: AffinityPolicy(replicas, FALLBACK_FACTOR),
}


@dataclass(slots=True)
class Engine:
    """One replica: a FIFO of prompts and an LRU cache of at most `capacity` blocks."""

    capacity: int
    queue: deque[int] = field(default_factory=deque)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    computed: int = 0

    def held(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are cached; these are used now."""
        held = next((i for i, block in enumerate(blocks) if block not in self.cache), len(blocks))
        for block in reversed(blocks[:held]):
            self.cache.move_to_end(block)
        return held

    def keep(self, blocks: Sequence[int]) -> tuple[Event, ...]:
        """Caches a prompt and drops what was used longest ago: what changed."""
        new = tuple(block for block in blocks if block not in self.cache)
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        gone = tuple(self.cache.popitem(last=False)[0] for _ in range(len(self.cache) - self.capacity))
        return (Stored(new), Removed(gone)) if gone else (Stored(new),)


def replay(
    requests: Sequence[TracedRequest], policy: Policy, replicas: int, capacity: int, blocks_per_s: float
) -> dict[str, float]:
    """Runs a trace through a policy; `blocks_per_s` is what one replica computes.

    Returns hit, imbalance, wait_p50_s and wait_p99_s as the module describes them.
    """
    engines = [Engine(capacity) for _ in range(replicas)]
    ends: list[tuple[float, int]] = []
    waits: list[float] = []
    hits = 0

    def start(replica: int, now: float) -> None:
        nonlocal hits
        engine = engines[replica]
        blocks = requests[engine.queue[0]].blocks
        held = engine.held(blocks)
        hits += held
        engine.computed += len(blocks) - held
        heapq.heappush(ends, (now + (len(blocks) - held) / blocks_per_s, replica))

    def end() -> None:
        now, replica = heapq.heappop(ends)
        engine = engines[replica]
        request = engine.queue.popleft()
        waits.append(now - requests[request].arrival_s)
        policy.events(replica, engine.keep(requests[request].blocks))
        policy.done(request, replica)
        if engine.queue:
            start(replica, now)

    for number, request in enumerate(requests):
        while ends and ends[0][0] <= request.arrival_s:
            end()
        replica = policy.choose(number, request.blocks)
        engines[replica].queue.append(number)
        if len(engines[replica].queue) == 1:
            start(replica, request.arrival_s)
    while ends:
        end()

    waits.sort()
    loads = [engine.computed for engine in engines]
    return {
        "hit": round(hits / sum(len(request.blocks) for request in requests), 4),
        "imbalance": round(max(loads) * replicas / sum(loads), 3),
        "wait_p50_s": round(waits[len(waits) // 2], 3),
        "wait_p99_s": round(waits[len(waits) * 99 // 100], 3),
    }


def speed(requests: Sequence[TracedRequest], replicas: int) -> float:
    """Blocks per second of one replica for 70 % use if each block were computed once."""
    duration_s = requests[-1].arrival_s - requests[0].arrival_s
    once = sum(len(request.blocks) for request in requests) - possible_hits(requests)
    return once / (USE_AT_PERFECT_REUSE * replicas * duration_s)


def run(requests: Sequence[TracedRequest], replicas: int, capacity: int) -> dict[str, object]:
    """The JSON object of the issue, for all policies."""
    blocks_per_s = speed(requests, replicas)
    policies = {}
    for name, create in POLICIES.items():
        policies[name] = replay(requests, create(replicas), replicas, capacity, blocks_per_s)
        print(f"{name}: {policies[name]}", flush=True)
    possible = possible_hits(requests) / sum(len(request.blocks) for request in requests)
    return {"possible_hit": round(possible, 4), "policies": policies}


def main() -> None:
    """Replays and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="trace in Mooncake's format")
    source.add_argument("--synthetic", choices=KINDS, help="make a trace of this kind instead")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic trace (default 0)")
    parser.add_argument("--replicas", type=int, default=8, help="replicas (default 8)")
    parser.add_argument("--blocks", type=int, default=8000, help="blocks that each replica keeps (default 8000)")
    options = parser.parse_args()
    requests = read_trace(options.trace) if options.trace else synthetic_trace(options.synthetic, options.seed)
    print(json.dumps(run(requests, options.replicas, options.blocks)))


if __name__ == "__main__":
    main()
