"""Requests through vLLM's own OpenAI layer and the walls, to a real collector; only the replica is scripted."""

from __future__ import annotations

import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.timing import free_port
from expertmesh.platform.config import load_config
from expertmesh.platform.logs import JsonLines, Origin, TextLines, current_request
from expertmesh.platform.logs.lines import RequestIds
from tests.access.test_keys import make, write
from tests.support.calls import calls_of
from tests.support.otlp import Collector, Seen, collector
from tests.support.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from ray.exceptions import ActorDiedError
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

    from expertmesh.deployments.ingress.app import openai_app
    from expertmesh.deployments.ingress.continuation import Engines
    from expertmesh.deployments.ingress.search import Patience
    from expertmesh.deployments.ingress.tenant import TenantCore
    from expertmesh.deployments.requests.watched import tell, watched
    from expertmesh.deployments.tracing.context import sane_request_id
    from expertmesh.deployments.tracing.tracer import Tracing
    from expertmesh.routing.requests import Rank

MODEL = "qwen3_moe"
SECRET_WORDS = "the crown jewels are under the oak"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TOKEN, KEY = make("team", requests_per_minute=1000)
SLOW_TOKEN, SLOW_KEY = make("slow", requests_per_minute=1)
COLLECTORS_SECRET = "collectors-own-secret"


class Replica:
    """In place of a Serve handle: `script` says, attempt by attempt, how many tokens come before it is lost.

    None: it answers to the end; an exception: it raises that in place of a token. It chooses as the router would.
    """

    def __init__(self) -> None:
        self.script: list[int | Exception | None] = []
        self.requests: list[EngineCoreRequest] = []

    def remote(self, request: EngineCoreRequest) -> Stream:
        """As a handle's."""
        self.requests.append(request)
        name = f"replica-{len(self.requests)}"
        if (choice := watched((request,))) is not None:
            tell(choice, name, 7, (Rank("full", 0.5, 9), Rank(name, 1.0, 3)))
        return Stream(request, self.script.pop(0) if self.script else None)


class Stream:
    """The outputs of one attempt."""

    def __init__(self, request: EngineCoreRequest, ends: int | Exception | None) -> None:
        self._request, self._ends = request, ends
        self._given = -1

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[EngineCoreOutput]:
        self._given += 1
        if self._given == 0:
            return []
        if isinstance(self._ends, Exception):
            raise self._ends
        if self._ends is not None and self._given > self._ends:
            raise ActorDiedError
        assert self._request.sampling_params is not None
        last = self._given == self._request.sampling_params.max_tokens
        reason = FinishReason.LENGTH if last else None
        return [EngineCoreOutput(self._request.request_id, new_token_ids=[5], finish_reason=reason)]


@dataclass
class Front:
    """The ingress' application, the replica that it asks, and the collector that it tells."""

    url: str
    replica: Replica
    traces: Collector
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    def ask(self, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        """A chat of three tokens whose prompt holds SECRET_WORDS."""
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 3, "temperature": 0}
        if path == "/v1/chat/completions":
            body["messages"] = [{"role": "user", "content": SECRET_WORDS}]
        else:
            body["prompt"] = SECRET_WORDS
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers | headers, timeout=60)

    def spans(self, count: int, trace_id: str = TRACE) -> list[Seen]:
        """Those of a trace, when there are so many."""
        self.traces.wait(lambda: len(self.traces.of(trace_id)) >= count)
        found = self.traces.of(trace_id)
        assert len(found) == count, [span.name for span in found]
        return found


@pytest.fixture(scope="module")
def running(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    path = write(tmp_path_factory.mktemp("keys") / "keys.json", KEY, SLOW_KEY)
    with pytest.MonkeyPatch.context() as patch, collector() as traces:
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-collector-key={COLLECTORS_SECRET}")
        telemetry = {"traces_endpoint": traces.url, "traces_sample": 0.0}
        config = load_config({"model": str(family(MODEL)), "ingress": {"keys_file": str(path)}, "telemetry": telemetry})
        replica = Replica()

        async def healthy() -> bool:
            return True

        tracing = Tracing(config.telemetry, Origin("ingress", "abc"))
        engines = Engines(True, stateful_processors=False)
        core = TenantCore(calls_of(replica.remote), Patience(20, 20), engines, tracer=tracing.tracer)
        app = asyncio.run(openai_app(config, family(MODEL), core, healthy, tracing.tracer))
        with served(app) as url:
            yield Front(url, replica, traces)
        tracing.close()


@pytest.fixture
def front(running: Front) -> Front:
    running.replica.script.clear()
    running.replica.requests.clear()
    running.traces.spans.clear()
    running.traces.bodies.clear()
    return running


def test_a_request_is_traced_from_its_callers_span_on(front: Front) -> None:
    answer = front.ask(traceparent=TRACEPARENT, **{"X-Request-Id": "order-66"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == "chatcmpl-order-66"
    server, route, attention = front.spans(3)
    assert (server.name, server.service, server.parent_id) == (
        "POST /v1/chat/completions",
        "expertmesh-ingress",
        PARENT,
    )
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": MODEL,
        "expertmesh.request.id": "order-66",
    }
    assert (route.name, route.parent_id, attention.name, attention.parent_id) == (
        "route",
        server.span_id,
        "attention",
        server.span_id,
    )
    assert route.attributes | {"expertmesh.sequence.id": ""} == {
        "expertmesh.sequence.id": "",
        "expertmesh.replica.id": "replica-1",
        "expertmesh.route.candidates": 2,
        "expertmesh.route.prompt_blocks": 7,
        "expertmesh.route.expected_hit_blocks": 3,
        "expertmesh.route.refusals": 0,
    }
    assert attention.attributes["expertmesh.replica.id"] == "replica-1"
    assert attention.attributes["gen_ai.usage.output_tokens"] == 3
    assert attention.attributes["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert attention.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert attention.events == ["first token"]
    assert route.end_ns <= attention.end_ns <= server.end_ns
    assert [server.failed, route.failed, attention.failed] == [False] * 3
    sent = front.replica.requests[0].trace_headers
    assert sent == {"traceparent": f"00-{TRACE}-{attention.span_id}-01", "x-request-id": "order-66"}


def test_the_collectors_key_comes_from_the_environment(front: Front) -> None:
    front.ask(traceparent=TRACEPARENT)
    front.spans(3)
    assert front.traces.headers[-1]["x-collector-key"] == COLLECTORS_SECRET


@pytest.mark.parametrize("said", [None, f"00-{TRACE}-{PARENT}-00", "00-nonsense-01"])
def test_who_is_not_sampled_is_not_traced_but_has_an_id(front: Front, said: str | None) -> None:
    headers = {"X-Request-Id": "plain"} | ({} if said is None else {"traceparent": said})
    assert front.ask(**headers).status_code == 200
    assert front.replica.requests[0].trace_headers == {"x-request-id": "plain"}
    front.ask(traceparent=f"00-{'ab' * 16}-{PARENT}-01")  # what comes later is there: so would be what came before
    front.spans(3, "ab" * 16)
    assert len(front.traces.spans) == 3


def test_a_fail_over_is_a_second_search_and_a_second_attempt_linked_to_the_first(front: Front) -> None:
    front.replica.script[:] = [2, None]
    assert front.ask(traceparent=TRACEPARENT).json()["usage"]["completion_tokens"] == 3
    front.spans(5)
    (server,), routes = front.traces.of(TRACE, "POST /v1/chat/completions"), front.traces.of(TRACE, "route")
    first, second = front.traces.of(TRACE, "attention")
    assert {span.parent_id for span in (*routes, first, second)} == {server.span_id}
    assert (first.failed, first.attributes["error.type"], second.failed) == (True, "ReplicaLost", False)
    assert (first.attributes["gen_ai.usage.output_tokens"], second.attributes["gen_ai.usage.output_tokens"]) == (2, 1)
    assert (second.links, second.attributes["expertmesh.tokens.known"]) == ([first.span_id], 2)
    assert [span.attributes["expertmesh.attempt"] for span in (first, second)] == [1, 2]
    assert [span.attributes["expertmesh.replica.id"] for span in routes] == ["replica-1", "replica-2"]
    assert not server.failed
    given = [request.trace_headers["traceparent"] for request in front.replica.requests if request.trace_headers]
    assert given == [f"00-{TRACE}-{span.span_id}-01" for span in (first, second)]


def test_each_sequence_of_a_request_has_its_own_spans(front: Front) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 1, "n": 2}
    headers = front.headers | {"traceparent": TRACEPARENT}
    assert httpx.post(f"{front.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    front.spans(5)
    assert len({span.attributes["expertmesh.sequence.id"] for span in front.traces.of(TRACE, "attention")}) == 2


def refused(front: Front) -> Iterator[tuple[int, httpx.Response]]:
    """Requests that end before a replica sees them, and how."""
    traced = {"traceparent": TRACEPARENT}
    yield 401, front.ask(**traced, Authorization="Bearer xm-000000000000-not-a-key")
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET_WORDS}], "max_tokens": SECRET_WORDS}
    url = f"{front.url}/v1/chat/completions"
    yield 400, httpx.post(url, json=body, headers=front.headers | traced, timeout=60)
    odd = {"model": MODEL, "input": [{"type": "message", "role": "assistant", "id": SECRET_WORDS, "content": []}]}
    yield 400, httpx.post(f"{front.url}/v1/responses", json=odd, headers=front.headers | traced, timeout=60)
    slow = {"Authorization": f"Bearer {SLOW_TOKEN}"}
    front.ask(**slow)
    yield 429, front.ask(**traced, **slow)
    yield 404, front.ask(f"/v1/{SECRET_WORDS.replace(' ', '-')}", **traced)


def test_refused_requests_have_a_span_each(front: Front) -> None:
    for status, answer in refused(front):
        assert answer.status_code == status, answer.text
        front.traces.wait(lambda: bool(front.traces.of(TRACE)))
        (span,) = front.traces.of(TRACE)
        assert (span.attributes["http.response.status_code"], span.failed) == (status, False)
        assert span.name == ("POST" if status == 404 else f"POST {answer.request.url.path}")
        front.traces.spans.clear()


def test_admin_routes_and_probes_have_none(front: Front) -> None:
    for path in ("/health", "/mesh/status"):
        httpx.get(f"{front.url}{path}", headers={"traceparent": TRACEPARENT})
    front.ask(traceparent=f"00-{'ab' * 16}-{PARENT}-01")
    front.spans(3, "ab" * 16)
    assert not front.traces.of(TRACE)


def test_a_request_that_fails_says_so_without_words(front: Front) -> None:
    front.replica.script[:] = [RuntimeError("an engine's own words")]
    answer = front.ask(traceparent=TRACEPARENT)
    assert answer.status_code == 500
    server, _, attention = front.spans(3)
    assert (server.failed, server.attributes["http.response.status_code"]) == (True, 500)
    assert (attention.failed, attention.attributes["error.type"]) == (True, "RuntimeError")
    assert b"own words" not in b"".join(front.traces.bodies)


@pytest.fixture
def all_logs() -> Iterator[list[str]]:
    """Every line that any logger of this process says at debug level, as text and as JSON."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith(("httpx", "httpcore")):  # the client's, which is in this process as well
                return
            lines.extend(form.format(record) for form in (TextLines(), JsonLines("ingress", "abc")))

    keeper, root = Keeper(), logging.getLogger()
    loggers = [root, *(logging.getLogger(name) for name in ("expertmesh", "vllm", "uvicorn", "opentelemetry"))]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = True
    root.addHandler(keeper)
    yield lines
    root.removeHandler(keeper)
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate


def test_neither_logs_nor_spans_hold_prompts_keys_or_secrets(front: Front, all_logs: list[str]) -> None:
    assert front.ask(traceparent=TRACEPARENT).status_code == 200
    assert front.ask("/v1/completions", traceparent=TRACEPARENT).status_code == 200
    statuses = [answer.status_code for _, answer in refused(front)]
    assert statuses == [401, 400, 400, 429, 404]
    front.replica.script[:] = [2, RuntimeError("broken"), None]
    assert front.ask(traceparent=TRACEPARENT, **{"X-Request-Id": "the-failed-one"}).status_code == 500
    front.traces.wait(lambda: len(front.traces.of(TRACE, "attention")) == 4)
    front.traces.wait(lambda: len([s for s in front.traces.of(TRACE) if s.name.startswith("POST")]) == 8)
    logs, spans = "\n".join(all_logs), b"".join(front.traces.bodies)
    assert "the-failed-one" in logs, "they are the logs"
    assert SECRET_WORDS.replace(" ", "-") not in logs + spans.decode(errors="replace")
    for hidden in (SECRET_WORDS, "crown jewels", TOKEN, SLOW_TOKEN, "not-a-key", KEY.sha256, COLLECTORS_SECRET):
        assert hidden not in logs, [line for line in all_logs if hidden in line][:3]
        assert hidden.encode() not in spans
    lines = [json.loads(line) for line in all_logs if line.startswith("{")]
    (lost,) = [line for line in lines if "lost its replica" in line["message"]]
    assert (lost["request_id"], lost["trace_id"]) == ("the-failed-one", TRACE)
    assert (lost["level"], lost["deployment"], lost["replica"]) == ("warning", "ingress", "abc")


@pytest.mark.parametrize("asked", [None, "", "two words", "x" * 129, "naïve", "a\nb", "\x7f"])
def test_an_odd_request_id_is_replaced(asked: str | None) -> None:
    made = sane_request_id(asked)
    assert made != asked
    assert sane_request_id(made) == made


def test_a_made_id_is_returned_and_names_the_request(front: Front) -> None:
    answer = front.ask(**{"X-Request-Id": "y" * 200})
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.json()["id"] == f"chatcmpl-{answer.headers['x-request-id']}"


def test_a_collector_that_is_away_costs_spans_and_no_request(
    front: Front, family: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    config = load_config({"model": str(family(MODEL)), "telemetry": {"traces_endpoint": f"http://127.0.0.1:{port}"}})
    with caplog.at_level(logging.DEBUG):
        tracing = Tracing(config.telemetry, Origin())
        for _ in range(5000):  # more than the queue holds
            tracing.tracer.start_span("a span").end()
        tracing.close()
        tracing.close()

        def said() -> list[logging.LogRecord]:
            return [record for record in caplog.records if record.name.startswith(("expertmesh", "opentelemetry"))]

        front.traces.wait(lambda: bool(said()))  # the thread that sends may be a moment late
    assert [record.name for record in said()] == ["expertmesh.tracing"]
    assert f"did not reach the collector at http://127.0.0.1:{port}" in said()[0].getMessage()


def test_lines_of_one_request_carry_its_ids_and_other_lines_none() -> None:
    record = logging.LogRecord("expertmesh.x", logging.INFO, "", 0, 'a "quoted"\nline of %s', ("two",), None)
    assert json.loads(JsonLines("", "r").format(record)).keys() == {"time", "level", "logger", "message", "replica"}
    token = current_request.set(RequestIds("me", TRACE))
    try:
        line = JsonLines("d", "r").format(record)
        assert "\n" not in line
        assert json.loads(line) | {"time": ""} == {
            "time": "",
            "level": "info",
            "logger": "expertmesh.x",
            "message": 'a "quoted"\nline of two',
            "request_id": "me",
            "trace_id": TRACE,
            "deployment": "d",
            "replica": "r",
        }
        assert "expertmesh.x [me]: a" in TextLines().format(record)
    finally:
        current_request.reset(token)
