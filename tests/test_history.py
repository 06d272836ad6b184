"""Figures out of counters, on clocks of the test's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expertmesh.deployments.attention.tally import Serving, Tally
from expertmesh.deployments.controller.history import History, Sample
from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport
from expertmesh.routing.placement import Target, even_slots

LAYERS, EXPERTS = (0, 2), 4


class Mesh:
    """Members that report counters when told to."""

    def __init__(self) -> None:
        self.now = 100.0
        slots = even_slots(len(LAYERS), EXPERTS, 2, 1)
        self.members = Membership(LAYERS, EXPERTS, slots, 1e9, lambda: self.now)
        self.history = History(len(LAYERS), EXPERTS, lambda: 1_000_000 + self.now, kept=5)

    def replica(self, name: str = "r", loads: Any = None, running: int = 0, **served: float) -> None:
        stats = {"served": served, "load": {"waiting": 1, "kv_use": 0.5}}
        counted = None if loads is None else np.array(loads, dtype=np.int64)
        self.members.report(AttentionReport(name, "node", True, 0, running, counted, stats))

    def shard(self, name: str, **stats: Any) -> None:
        if name not in self.members.shards:
            self.members.join(JoinRequest(name, "node"))
        held = self.members.slots[self.members.shards[name].index].copy()
        assert self.members.heartbeat(ShardReport(name, Target(name, "node", ("unix:@x",)), held, stats=stats))

    def sample(self) -> Sample:
        return self.history.take(self.members, self.now)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


def test_an_idle_mesh_has_no_means(mesh: Mesh) -> None:
    sample = mesh.sample()
    assert (sample.attention, sample.shards, sample.tokens_s, sample.rows_s) == (0, 0, 0.0, 0.0)
    assert (sample.kv_hits, sample.ttft_s, sample.itl_s, sample.balancedness) == (None, None, None, None)


def test_rates_and_means_are_those_of_the_interval(mesh: Mesh) -> None:
    before = {"requests": 10, "prompt_tokens": 1000, "cached_tokens": 100, "fetched_tokens": 0, "tokens": 500}
    mesh.replica(**before, ttft_s=5.0, intervals=490, itl_s=49.0)
    assert mesh.sample().tokens_s == 0.0, "what came before is of no interval"
    mesh.now += 2
    after = {"requests": 14, "prompt_tokens": 1400, "cached_tokens": 300, "fetched_tokens": 100, "tokens": 600}
    mesh.replica(running=3, **after, ttft_s=6.0, intervals=586, itl_s=53.8)
    sample = mesh.sample()
    assert (sample.requests_s, sample.tokens_s, sample.prompt_tokens_s) == (2.0, 50.0, 200.0)
    assert (sample.kv_hits, sample.kv_fetched) == (0.75, 0.25)
    assert (sample.ttft_s, sample.itl_s) == (0.25, 0.05)
    assert (sample.running, sample.waiting, sample.kv_use) == (3, 1, 0.5)
    assert sample.at == 1_000_102


def test_rates_do_not_depend_on_when_reports_come(mesh: Mesh) -> None:
    mesh.replica(tokens=0)
    mesh.sample()
    mesh.now += 1.5
    mesh.replica(tokens=150)
    mesh.now += 0.5
    assert mesh.sample().tokens_s == 100.0
    mesh.now += 2
    assert mesh.sample().tokens_s == 100.0, "no report since"
    mesh.now += 0.5
    mesh.replica(tokens=450)
    assert mesh.sample().tokens_s == 100.0


def test_a_replica_that_starts_again_or_goes_takes_nothing_away(mesh: Mesh) -> None:
    mesh.replica("a", tokens=1000)
    mesh.replica("b", tokens=1000)
    mesh.sample()
    mesh.now += 1
    mesh.replica("a", tokens=5)
    mesh.replica("b", tokens=1100)
    assert mesh.sample().tokens_s == 100.0
    del mesh.members.attention["b"]
    sample = mesh.sample()
    assert (sample.attention, sample.tokens_s) == (1, 0.0)


def test_shards_busy_and_balanced(mesh: Mesh) -> None:
    mesh.shard("a", busy_s=1.0, pairs=100, layer_pairs={0: 50, 2: 50})
    mesh.shard("b", busy_s=1.0, pairs=100, layer_pairs={0: 50, 2: 50})
    assert mesh.sample().balancedness is None
    mesh.now += 2
    mesh.shard("a", busy_s=2.0, pairs=700, layer_pairs={0: 250, 2: 450})
    mesh.shard("b", busy_s=1.5, pairs=500, layer_pairs={0: 250, 2: 250})
    sample = mesh.sample()
    assert (sample.rows_s, sample.busy) == (500.0, 0.375)
    assert sample.balancedness == pytest.approx((1.0 + 0.75) / 2)
    lately = mesh.history.since(0)["shards"]
    assert lately == {"a": {"busy": 0.5, "rows_s": 300.0}, "b": {"busy": 0.25, "rows_s": 200.0}}


def test_a_layer_without_rows_says_nothing_about_balance(mesh: Mesh) -> None:
    mesh.shard("a", layer_pairs={0: 0, 2: 0})
    mesh.shard("b", layer_pairs={0: 0, 2: 0})
    mesh.sample()
    mesh.now += 1
    mesh.shard("a", layer_pairs={0: 10, 2: 0})
    mesh.shard("b", layer_pairs={0: 10, 2: 0})
    assert mesh.sample().balancedness == 1.0


def test_heat_follows_the_rows_and_cools(mesh: Mesh) -> None:
    loads = np.zeros((2, 4), dtype=np.int64)
    mesh.replica(loads=loads)
    mesh.sample()
    for _ in range(30):
        mesh.now += 2
        loads[1, 3] += 200
        mesh.replica(loads=loads)
        mesh.sample()
    heat = mesh.history.rows_a_second
    assert heat[1, 3] == pytest.approx(100, rel=0.01)
    assert heat.sum() == heat[1, 3]
    mesh.now += 6
    mesh.sample()
    assert mesh.history.rows_a_second[1, 3] == pytest.approx(50, rel=0.01)


def test_the_oldest_samples_go_and_a_reader_gets_what_is_new(mesh: Mesh) -> None:
    samples = []
    for _ in range(7):
        mesh.now += 2
        samples.append(mesh.sample())
    told = mesh.history.since(0)
    assert [s["at"] for s in told["samples"]] == [s.at for s in samples[2:]]
    assert [s["at"] for s in mesh.history.since(samples[5].at)["samples"]] == [samples[6].at]
    assert mesh.history.since(samples[6].at)["samples"] == []


def test_a_tally_of_what_an_engine_gave() -> None:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import PrefillStats

    now, tally = [10.0], Tally()

    def take(serving: Serving, at: float, tokens: int, prefill: PrefillStats | None = None) -> None:
        now[0] = at
        serving.take(EngineCoreOutput("r", [1] * tokens, prefill_stats=prefill))

    prefill = PrefillStats()
    prefill.set(100, 60, 10)
    serving = Serving(tally, lambda: now[0])
    take(serving, 10.2, 0)
    assert tally == Tally(), "no token yet"
    take(serving, 10.5, 1, prefill)
    take(serving, 10.6, 1)
    take(serving, 10.9, 2)
    other = Serving(tally, lambda: now[0])
    take(other, 11.0, 1)
    assert tally.as_dict() == pytest.approx(
        {
            "requests": 2,
            "prompt_tokens": 100,
            "cached_tokens": 60,
            "fetched_tokens": 10,
            "tokens": 5,
            "ttft_s": 0.6,
            "intervals": 3,
            "itl_s": 0.4,
        }
    )
