"""Spans of requests to a running mesh, from the HTTP request to its shards' frames."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.checkpoints import expert_layout, open_checkpoint
from expertmesh.routing.dispatch.samples import MAX_SAMPLES
from tests.support.otlp import Collector

pytestmark = pytest.mark.mesh

PARENT = "00f067aa0ba902b7"
QUESTION = "What is the capital of France, asks an unmistakable person?"


def ask(mesh: LocalMesh, trace_id: str, tokens: int) -> httpx.Response:
    """A chat in a trace."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01", "X-Request-Id": trace_id}
    answer = httpx.post(f"{mesh.url}/v1/chat/completions", json=body, headers=headers, timeout=240)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_request_is_followed_to_its_shards(demo_mesh: LocalMesh, demo_folder: Path, traces: Collector) -> None:
    layout = expert_layout(open_checkpoint(demo_folder))
    trace_id = uuid.uuid4().hex
    answer = ask(demo_mesh, trace_id, 4)
    assert answer.headers.get_list("x-request-id") == [trace_id]
    assert answer.json()["id"] == f"chatcmpl-{trace_id}"
    shards = {s["shard"] for s in httpx.get(f"{demo_mesh.url}/mesh/status", timeout=60).json()["shards"]}
    traces.wait(lambda: bool(traces.of(trace_id, "POST /v1/chat/completions") and traces.of(trace_id, "engine")))
    traces.wait(lambda: samples(traces, trace_id) == MAX_SAMPLES)
    (server,) = traces.of(trace_id, "POST /v1/chat/completions")
    (route,), (attention,) = traces.of(trace_id, "route"), traces.of(trace_id, "attention")
    (engine,) = traces.of(trace_id, "engine")
    assert [server.parent_id, route.parent_id, attention.parent_id, engine.parent_id] == [
        PARENT,
        server.span_id,
        server.span_id,
        attention.span_id,
    ]
    assert server.start_ns <= attention.start_ns <= engine.start_ns <= engine.end_ns <= server.end_ns
    assert (server.service, engine.service) == ("expertmesh-ingress", "expertmesh-attention")
    assert engine.events[:3] == ["queued", "scheduled", "first token"]
    assert (engine.attributes["gen_ai.usage.output_tokens"], attention.attributes["gen_ai.usage.output_tokens"]) == (
        4,
        4,
    )
    for part in ("time_to_first_token", "time_in_queue", "time_in_model_prefill", "time_in_model_decode"):
        assert engine.attributes[f"gen_ai.latency.{part}"] > 0, part
    prompt = answer.json()["usage"]["prompt_tokens"]
    dispatches = traces.of(trace_id, "dispatch")
    for span in dispatches:
        assert (span.parent_id, span.service, span.failed) == (engine.span_id, "expertmesh-attention", False)
        assert engine.start_ns <= span.start_ns <= span.end_ns <= engine.end_ns
        assert span.attributes["expertmesh.dispatch.computed_us"] > 0
    assert {span.attributes["expertmesh.shard.id"] for span in dispatches} == shards
    assert {span.attributes["expertmesh.layer"] for span in dispatches} == set(layout.layers)
    top_k = dispatched_pairs(traces, trace_id, layout.layers[0])[0] / prompt
    assert top_k == int(top_k)
    assert top_k == dispatched_pairs(traces, trace_id, layout.layers[0])[1], "the second step has one token"


def samples(traces: Collector, trace_id: str) -> int:
    """Layers of steps with spans."""
    return len({(span.attributes["expertmesh.layer"], span.start_ns) for span in traces.of(trace_id, "dispatch")})


def dispatched_pairs(traces: Collector, trace_id: str, layer: int) -> list[int]:
    """(token, expert) pairs of a layer in each step, over all shards."""
    steps: dict[int, int] = {}
    for span in traces.of(trace_id, "dispatch"):
        if span.attributes["expertmesh.layer"] == layer:
            steps[span.start_ns] = steps.get(span.start_ns, 0) + span.attributes["expertmesh.dispatch.pairs"]
    return list(steps.values())


def test_requests_of_one_step_share_its_samples(demo_mesh: LocalMesh, traces: Collector) -> None:
    both = [uuid.uuid4().hex for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda trace_id: ask(demo_mesh, trace_id, 24), both))
    traces.wait(lambda: all(len(traces.of(trace_id, "engine")) == 1 for trace_id in both))
    traces.wait(lambda: all(samples(traces, trace_id) == MAX_SAMPLES for trace_id in both))
    engines = {traces.of(trace_id, "engine")[0].span_id for trace_id in both}
    links = {link for trace_id in both for span in traces.of(trace_id, "dispatch") for link in span.links}
    assert links <= engines


def test_what_is_not_asked_to_be_traced_is_not_and_no_prompt_ever_is(demo_mesh: LocalMesh, traces: Collector) -> None:
    seen = {span.trace_id for span in traces.spans}
    body = {"model": "demo", "prompt": QUESTION, "max_tokens": 2}
    assert httpx.post(f"{demo_mesh.url}/v1/completions", json=body, timeout=240).status_code == 200
    last = uuid.uuid4().hex
    ask(demo_mesh, last, 1)
    traces.wait(lambda: len(traces.of(last, "engine")) == 1)
    assert {span.trace_id for span in traces.spans} == seen | {last}
    assert b"unmistakable" not in b"".join(traces.bodies)
