"""What is recorded of what happens: pure parts with a recorder that remembers, clocks in hand."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput
from vllm.v1.metrics.stats import PrefillStats

from expertmesh.deployments.controller.replacement import State
from expertmesh.deployments.controller.scaling import Scaling
from expertmesh.deployments.telemetry.attention import AttentionMetrics
from expertmesh.deployments.telemetry.controller import ControllerMetrics, Figures
from expertmesh.deployments.telemetry.ingress import IngressMetrics, OutcomeMiddleware
from expertmesh.deployments.telemetry.recorder import Recorder, SilentRecorder, publish_forever, recorder_for
from expertmesh.platform.autoscaling.targets import Targets
from expertmesh.platform.config import load_config
from expertmesh.platform.metrics import Series
from expertmesh.platform.metrics import catalogue as series
from expertmesh.platform.metrics.catalogue import INGRESS
from expertmesh.routing.dispatch.mailbox import EVENTS, PARTS
from tests.test_durable import Memory as Store
from tests.test_takeover import Mesh as ShardsAndReplicas


class Remembering(Recorder):
    """Keeps everything, by series and label values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self.observed: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
        self.gauges: dict[tuple[str, ...], float] = {}

    def count(self, series: Series, amount: float = 1, **labels: str) -> None:
        assert amount > 0
        self.counts[self._key(series, labels)] += amount

    def observe(self, series: Series, value: float, **labels: str) -> None:
        self.observed[self._key(series, labels)].append(value)

    def set(self, series: Series, value: float, **labels: str) -> None:
        self.gauges[self._key(series, labels)] = value

    @staticmethod
    def _key(series: Series, labels: dict[str, str]) -> tuple[str, ...]:
        assert list(labels) == [label.name for label in series.labels]
        for label in series.labels:
            assert label.is_member or labels[label.name] in label.values
        return (series.name.removeprefix("expertmesh_"), *labels.values())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> Remembering:
    return Remembering()


def test_a_count_that_somebody_keeps_is_followed_even_if_it_begins_anew(memory: Remembering) -> None:
    for total in (5, 5, 9, 2, 3):
        memory.count_to(series.MOVES, total, outcome="done")
        memory.count_to(series.MOVES, 1, outcome="abandoned")
    assert memory.counts == {("moves", "done"): 9 + 3, ("moves", "abandoned"): 1}


def test_times_of_a_generation(memory: Remembering) -> None:
    clock = Clock()
    metrics = IngressMetrics(memory, "replica", clock)
    meter = metrics.request()
    for at, tokens in ((100.25, 0), (100.5, 0), (101, 1), (101.5, 1), (103.5, 4), (103.75, 0)):
        clock.now = at
        meter.picked_up()
        meter.tokens(tokens)
    clock.now = 104
    meter.ended(None)
    metrics.publish(3)
    metrics.publish(2)
    assert memory.gauges == {("sequences_in_progress", "replica"): 2}
    assert memory.observed == {
        ("pickup_seconds",): [0.25],
        ("ttft_seconds",): [1.0],
        ("itl_seconds",): [0.5, 0.5],
        ("sequence_seconds",): [4.0],
    }
    assert memory.counts == {("generated_tokens",): 6, ("sequences", "ok"): 1}


def test_of_many_tokens_in_a_second_some_are_observed(memory: Remembering) -> None:
    clock = Clock()
    metrics = IngressMetrics(memory, "replica", clock)
    meter = metrics.request()
    for second in range(3):
        for part in range(1000):
            clock.now = 100 + second + part / 1000
            meter.tokens(1)
    assert len(memory.observed["itl_seconds",]) == 300
    metrics.publish(1)
    assert memory.counts["generated_tokens",] == 3000


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (asyncio.CancelledError(), "cancelled"),
        (GracefulHTTPError("full", HTTPStatus.TOO_MANY_REQUESTS), "limited"),
        (GracefulHTTPError("none", HTTPStatus.SERVICE_UNAVAILABLE), "unavailable"),
        (GracefulHTTPError("died", HTTPStatus.INTERNAL_SERVER_ERROR), "failed"),
        (ValueError("a bug"), "failed"),
    ],
)
def test_how_a_generation_ends(memory: Remembering, error: BaseException | None, outcome: str) -> None:
    meter = IngressMetrics(memory).request()
    meter.lost("resubmit")
    meter.ended(error)
    assert memory.counts == {("sequences", outcome): 1, ("request_failovers", "resubmit"): 1}
    assert not memory.observed, "it had no token"


async def _raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("a bug")


async def _stops_half_way(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"data", "more_body": True})
    raise asyncio.CancelledError


def answers(status: int) -> Callable[[], ASGIApp]:
    def make() -> Response:
        return PlainTextResponse("x", status)

    return make


@pytest.mark.parametrize(
    ("path", "app", "counted"),
    [
        ("/v1/completions", answers(200), ("completions", "ok")),
        ("/v1/chat/completions", answers(400), ("chat", "invalid")),
        ("/v1/chat/completions", answers(401), ("chat", "invalid")),
        ("/tokenize", answers(429), ("other", "limited")),
        ("/v1/completions", answers(503), ("completions", "unavailable")),
        ("/v1/completions", answers(500), ("completions", "failed")),
        ("/v1/completions", lambda: _raises, ("completions", "failed")),
        ("/v1/completions", lambda: _stops_half_way, ("completions", "cancelled")),
        ("/mesh/status", answers(200), None),
        ("/health", answers(503), None),
    ],
)
async def test_how_a_request_ends(
    memory: Remembering, path: str, app: Callable[[], ASGIApp], counted: tuple[str, str] | None
) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    try:
        await OutcomeMiddleware(app(), IngressMetrics(memory))(scope, receive, send)
    except (ValueError, asyncio.CancelledError):
        pass
    else:
        assert sent[-1]["type"] == "http.response.body"
    assert memory.counts == ({} if counted is None else {("requests", *counted): 1})


def _output(events: list[EngineCoreEvent] | None, prefill: PrefillStats | None) -> EngineCoreOutput:
    return EngineCoreOutput("r", [1], events=events, prefill_stats=prefill)


def test_outputs_of_an_engine_say_what_waited_and_what_was_cached(memory: Remembering) -> None:
    metrics = AttentionMetrics(memory, "a")
    kinds = EngineCoreEventType
    events = [(kinds.QUEUED, 1.0), (kinds.SCHEDULED, 1.5), (kinds.PREEMPTED, 2.0), (kinds.SCHEDULED, 3.0)]
    prefill = PrefillStats()
    prefill.set(100, 32, 48)
    metrics.take(_output([EngineCoreEvent(kind, at) for kind, at in events], prefill))
    metrics.take(_output(None, None))
    assert memory.observed == {("engine_queue_seconds",): [0.5]}
    assert memory.counts == {
        ("engine_preemptions",): 1,
        ("prompt_tokens", "computed"): 20,
        ("prompt_tokens", "local"): 32,
        ("prompt_tokens", "store"): 48,
    }


def test_every_count_of_a_dispatcher_is_recorded(memory: Remembering) -> None:
    counts = {name: 1000 + i for i, name in enumerate(EVENTS + PARTS)}
    AttentionMetrics(memory, "a").dispatch(counts, 77, 5)
    in_ns = {round(value * 1e9) for key, value in memory.counts.items() if "seconds" in key[0]}
    assert in_ns | set(memory.counts.values()) >= set(counts.values()) | {77}
    assert len(memory.counts) == len(counts) + 1
    assert memory.gauges == {("table_epoch", "a"): 5}


def test_the_kv_tiers_report(memory: Remembering) -> None:
    metrics = AttentionMetrics(memory, "a")
    metrics.kv_store({"counts": {}, "servers": []})
    assert not memory.counts
    assert {key[0] for key in memory.gauges} == {"kv_store_servers"}
    counts = {"looked_up": 21, "found": 20, "load_sound": 8, "load_corrupt": 1, "loaded_bytes": 4096, "timed_out": 3}
    servers: list[dict[str, Any]] = [
        {"endpoint": "a", "state": "open", "opened": 2},
        {"endpoint": "b", "state": "closed", "opened": 1},
    ]
    metrics.kv_store({"counts": {**counts, "admitted": 5, "gated": 6}, "servers": servers})
    assert memory.counts == {
        ("kv_store_lookups", "found"): 20,
        ("kv_store_lookups", "missing"): 1,
        ("kv_store_loads", "sound"): 8,
        ("kv_store_loads", "corrupt"): 1,
        ("kv_store_bytes", "loaded"): 4096,
        ("kv_store_errors", "timed_out"): 3,
        ("kv_store_gate", "fetch"): 5,
        ("kv_store_gate", "compute"): 6,
        ("kv_store_breaker_openings",): 3,
    }
    states = {key[-1]: value for key, value in memory.gauges.items()}
    assert states == {"closed": 1, "half_open": 0, "open": 1}


def test_what_the_controller_knows(memory: Remembering) -> None:
    mesh = ShardsAndReplicas(3)
    scaling = Scaling(load_config({"model": "demo", "experts": {"shards": 3}}), mesh.members, Targets(Store(), "app"))
    metrics = ControllerMetrics(memory, mesh.members, mesh.replacement, mesh.takeover, scaling)
    mesh.start()
    mesh.depart(next(iter(mesh.held)))
    mesh.come()
    scaling.scale(2, None)
    for _ in range(2):
        metrics.publish(Figures(healthy=True, missing=0, balancedness=0.75, frozen=False))
    gauges, counts = memory.gauges, memory.counts
    assert gauges["healthy",] == 1
    assert gauges["balancedness",] == 0.75
    assert gauges["placement_epoch",] == mesh.members.epoch
    assert [gauges["members", "attention", state] for state in ("ready", "starting", "leaving")] == [2, 0, 0]
    states = [gauges["members", "experts", state] for state in ("ready", "starting", "leaving")]
    assert states == [2, 1, 1]
    assert gauges["wanted_members", "attention"] == 2
    assert counts["scaling_decisions", "attention", "up", "manual"] == 1
    assert counts["adopted_experts",] == mesh.takeover.adopted > 0
    mesh.settle()
    metrics.publish(Figures(healthy=False, missing=7, balancedness=1.0, frozen=True))
    assert [gauges[name,] for name in ("healthy", "missing_experts", "placement_frozen")] == [0, 7, 1]
    assert counts["moves", "done"] == mesh.replacement.counts[State.DONE] > 0


def test_switched_off_or_outside_of_a_replica_nothing_is_recorded() -> None:
    for metrics in (True, False):
        config = load_config({"model": "demo", "telemetry": {"metrics": metrics}})
        assert isinstance(recorder_for(config, INGRESS), SilentRecorder)


async def test_publishing_goes_on_after_an_error(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("expertmesh.deployments.telemetry.recorder.PUBLISH_S", 0)
    calls = 0
    enough = asyncio.Event()

    def publish() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            enough.set()
        raise OSError("the folder is gone")

    task = asyncio.create_task(publish_forever(publish))
    await asyncio.wait_for(enough.wait(), 30)
    task.cancel()
    assert caplog.text.count("metrics could not be published") == 1
