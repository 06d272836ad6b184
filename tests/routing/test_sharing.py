"""Live cost on real frame servers: a shard that slows down gets fewer tokens, and gets them back.

Kernels take their time on a clock of their own, so nothing here depends on how busy the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, StaticTable, create_policy
from expertmesh.routing.dispatch.copies import TableCopies
from expertmesh.routing.dispatch.split import EXPERT_COST_ROWS
from expertmesh.routing.placement import RoutingTable, Target, build_table, even_slots
from expertmesh.routing.wire.frame import DispatchBody
from tests.routing.harness import EXPERTS, LAYERS, NODE, REVISION, SECRET, RunningServer, batch

TOKENS, TOP_K = 256, 4


class Metered:
    """A kernel that takes so much for each pair, and for each expert as much as for some pairs more."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.ns_a_row = 10_000
        self.pairs = 0

    def clock(self) -> int:
        """Nanoseconds, as this kernel makes them pass."""
        return self.now_ns

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """The rows as they came."""
        self.pairs += len(body.experts)
        rows = len(body.experts) + EXPERT_COST_ROWS * len(body.experts.unique())
        self.now_ns += rows * self.ns_a_row
        return body.x.clone()


class Shards:
    """Frame servers that each hold some experts, and a dispatcher."""

    def __init__(self, shards: int, redundancy: int, policy: str) -> None:
        self.kernels = [Metered() for _ in range(shards)]
        self.servers = [RunningServer(kernel, clock_ns=kernel.clock) for kernel in self.kernels]
        slots = even_slots(len(LAYERS), EXPERTS, shards, redundancy)
        targets = {i: server.target for i, server in enumerate(self.servers)}
        table = build_table(1, LAYERS, EXPERTS, slots, targets)
        self.dispatcher = Dispatcher(StaticTable(table), SECRET, DispatchSettings(NODE, REVISION, policy))
        self._seed = 0

    def shares(self, steps: int) -> list[float]:
        """Part of the pairs that each shard gets in so many more steps."""
        for kernel in self.kernels:
            kernel.pairs = 0
        for _ in range(steps):
            self._seed += 1
            self.dispatcher(LAYERS[self._seed % 2], *batch(TOKENS, TOP_K, seed=self._seed))
        pairs = np.array([kernel.pairs for kernel in self.kernels])
        assert pairs.sum() == steps * TOKENS * TOP_K
        shares: list[float] = (pairs / pairs.sum()).tolist()
        return shares

    def close(self) -> None:
        """Ends everything."""
        self.dispatcher.close()
        for server in self.servers:
            server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Shards]]:
    started: list[Shards] = []

    def make(*arguments: Any) -> Shards:
        started.append(Shards(*arguments))
        return started[-1]

    yield make
    for shards in started:
        shards.close()


@pytest.mark.parametrize(("shards", "slowed"), [(2, 1 / 3), (3, 1 / 5)])
def test_a_shard_at_half_speed_gets_half_as_much_and_gets_it_back(
    start: Callable[..., Shards], shards: int, slowed: float
) -> None:
    mesh = start(shards, shards, "live_cost")
    even = 1 / shards
    assert mesh.shares(20) == pytest.approx([even] * shards, abs=0.03)
    mesh.kernels[0].ns_a_row *= 2
    mesh.shares(20)
    # Rows are what is divided in that ratio; pairs are a little less even, as an opened expert counts as rows too.
    assert mesh.shares(10)[0] == pytest.approx(slowed, abs=0.04)
    mesh.kernels[0].ns_a_row //= 2
    mesh.shares(20)
    assert mesh.shares(10) == pytest.approx([even] * shards, abs=0.03)


def test_a_shard_that_got_nothing_is_tried_again(start: Callable[..., Shards]) -> None:
    """So slow that it is left out: it must come back all the same."""
    mesh = start(2, 2, "live_cost")
    mesh.shares(5)
    mesh.kernels[1].ns_a_row *= 1000
    mesh.shares(20)
    assert mesh.shares(5)[1] < 0.02
    mesh.kernels[1].ns_a_row //= 1000
    mesh.shares(40)
    assert mesh.shares(10) == pytest.approx([0.5, 0.5], abs=0.05)


def test_least_loaded_takes_every_shard_for_the_same(start: Callable[..., Shards]) -> None:
    mesh = start(2, 2, "least_loaded")
    mesh.kernels[0].ns_a_row *= 2
    mesh.shares(20)
    assert mesh.shares(10) == pytest.approx([0.5, 0.5], abs=0.03)


def test_where_there_is_no_choice_nothing_is_learnt(
    start: Callable[..., Shards], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each expert has one copy: the policy is never asked, whatever the shards cost."""
    mesh = start(2, 1, "live_cost")

    def never(*arguments: object) -> None:
        pytest.fail("the policy was asked")

    monkeypatch.setattr(mesh.dispatcher._policy, "observe", never)
    monkeypatch.setattr(mesh.dispatcher._policy, "shares", never)
    mesh.kernels[0].ns_a_row *= 50
    assert mesh.shares(20) == pytest.approx([0.5, 0.5], abs=0.1)


@dataclass
class Times:
    """What an answer says."""

    computed_us: int
    waited_us: int


def test_frames_that_wait_cost_their_shard_tokens() -> None:
    """Equal kernels, but frames to one shard wait for as long as half of the step's rows take."""
    targets = {i: Target(str(i), NODE, ()) for i in range(2)}
    table = build_table(1, (0,), EXPERTS, even_slots(1, EXPERTS, 2, 2), targets)
    layer, up = TableCopies(table).layers[0], np.ones(2, dtype=bool)
    policy = create_policy("live_cost")
    policy.use(table)
    counts = np.full(EXPERTS, 100, dtype=np.int64)

    def step(waited_rows: int) -> list[int]:
        shares = policy.shares(layer, counts, up)
        tokens = np.bincount(layer.copies.ravel(), shares.ravel(), minlength=2)
        opened = np.bincount(layer.copies[shares > 0], minlength=2)
        computed = ((tokens + EXPERT_COST_ROWS * opened) * 10).tolist()
        policy.observe(layer, shares, {0: Times(computed[0], waited_rows * 10), 1: Times(computed[1], 0)})
        result: list[int] = tokens.tolist()
        return result

    assert step(0) == [400, 400]
    for _ in range(20):
        step(400)
    assert step(400)[0] == pytest.approx(200, abs=30)
    for _ in range(40):
        step(0)
    assert step(0)[0] == pytest.approx(400, abs=10)


def test_what_is_known_of_shards_outlives_a_new_table_with_the_same() -> None:
    copies = np.tile(np.arange(2, dtype=np.int32), (1, 4, 1))
    policy = create_policy("live_cost")
    up = np.ones(2, dtype=bool)
    counts = np.full(4, 300, dtype=np.int64)
    shares = []
    for epoch, names in enumerate(("ab", "ab", "ac")):
        table = RoutingTable(epoch, (0,), tuple(Target(name, NODE, ()) for name in names), copies)
        policy.use(table)
        layer = TableCopies(table).layers[0]
        shares.append(policy.shares(layer, counts, up))
        if epoch == 0:
            policy.observe(layer, shares[0], {0: Times(9000, 0), 1: Times(1000, 0)})
    first, again, others = (int(share.sum(axis=0)[0]) for share in shares)
    assert (first, others) == (600, 600)
    assert again < 200
