"""Replicas that go away under a real ingress: what a client sees, and what the next replica is asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.bare import Worker
from benchmarks.timing import free_port
from tests.ingress.scripted import PROMPT, REPLICAS, TEXT, Fate, IngressHost
from tests.support.otlp import Collector, collector

pytestmark = pytest.mark.mesh

MAX_REQUESTS = 3
REPLICA_TIMEOUT_S, INACTIVITY_S = 8.0, 4.0
TELEMETRY = {"log_level": "debug", "log_format": "json", "traces_sample": 0.0}
"""Traced is what a test asks to be."""
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MID_EMOJI = 6
"""Tokens of TEXT that end inside its first emoji."""


class Mesh:
    """The application, from outside and from behind the scenes."""

    def __init__(self, worker: Worker, port: int, traces: Collector) -> None:
        self._worker = worker
        self.traces = traces
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def stage(self, *fates: Fate, always: Fate | None = None) -> None:
        """What happens to the next attempts, and to all after them."""
        self._worker.ask("stage", list(fates), always or Fate())

    def scale(self, replicas: int) -> None:
        """Serves with this many attention replicas."""
        self._worker.ask("scale", replicas)

    def release(self) -> None:
        """Lets attempts go on that wait."""
        self._worker.ask("release")

    @property
    def attempts(self) -> list[tuple[int, int, int | None, int]]:
        """Prompt tokens, tokens to force, max_tokens and min_tokens of each attempt."""
        return list(self._worker.ask("seen")[0])

    @property
    def cancelled(self) -> int:
        """Attempts that were stopped from outside."""
        return int(self._worker.ask("seen")[1])

    @property
    def asked(self) -> int:
        """Replicas that were asked."""
        return int(self._worker.ask("seen")[2])

    def ask(self, **change: Any) -> httpx.Response:
        """A completion of PROMPT."""
        body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, **change}
        return self.http.post("/v1/completions", json=body)

    def ask_traced(self, **headers: str) -> httpx.Response:
        """The same as part of TRACE."""
        body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
        return self.http.post(
            "/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01", **headers}
        )

    def logs(self) -> str:
        """Of the ingress."""
        return str(self._worker.ask("logs"))

    def stream(self, **change: Any) -> tuple[str, tuple[int, int], list[str]]:
        """Text, usage and reasons to finish of a streamed completion."""
        answer = self.ask(stream=True, stream_options={"include_usage": True}, **change)
        assert answer.status_code == 200, answer.text
        *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert done == "[DONE]"
        parsed = [json.loads(event) for event in events]
        choices = [choice for event in parsed for choice in event["choices"]]
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        return "".join(choice["text"] for choice in choices), usage_of(parsed[-1]), reasons


@pytest.fixture(scope="module")
def mesh(family: Callable[[str], Path]) -> Iterator[Mesh]:
    port = free_port()
    ingress = {"max_ongoing_requests": MAX_REQUESTS, "replica_timeout_s": REPLICA_TIMEOUT_S}
    attention = {"inactivity_timeout_s": INACTIVITY_S}
    with (
        collector() as traces,
        Worker(
            IngressHost, family("qwen3_moe"), port, ingress, attention, {**TELEMETRY, "traces_endpoint": traces.url}
        ) as worker,
    ):
        mesh = Mesh(worker, port, traces)
        mesh.stage()
        with mesh.http:
            assert eventually(lambda: mesh.ask(max_tokens=1).status_code == 200)
            yield mesh


def eventually(check: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def usage_of(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    return error


def test_the_cut_is_in_the_middle_of_a_character(family: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family("qwen3_moe"))
    assert tokenizer.decode(tokenizer.encode(TEXT)[:MID_EMOJI]).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("end", ["killed", "engine dead", "silent", "abort", "error", "hangs"])
def test_a_stream_goes_on_in_the_middle_of_a_character(mesh: Mesh, end: str) -> None:
    mesh.stage()
    undisturbed = mesh.stream()
    assert (undisturbed[0], undisturbed[2]) == (TEXT, ["stop"])
    mesh.stage(Fate(end, MID_EMOJI))
    assert mesh.stream() == undisturbed
    first, second = [attempt[0] - len(PROMPT) for attempt in mesh.attempts]
    # The last tokens of a process that is killed may never leave it.
    assert (first, second) == (0, MID_EMOJI) or (end == "killed" and second < MID_EMOJI)


def test_an_answer_in_one_piece_goes_on_too(mesh: Mesh) -> None:
    mesh.stage()
    undisturbed = mesh.ask().json()
    mesh.stage(Fate("silent", 9), Fate("engine dead", 1))
    again = mesh.ask().json()
    assert again["choices"] == undisturbed["choices"]
    assert again["usage"] == undisturbed["usage"]
    assert len(mesh.attempts) == 3


def test_the_next_replica_gets_the_tokens_so_far(mesh: Mesh) -> None:
    mesh.stage(Fate("silent", 3), Fate("silent", 4))
    answer = mesh.ask(max_tokens=20, min_tokens=5).json()
    assert mesh.attempts == [(3, 0, 20, 5), (6, 0, 17, 2), (10, 0, 13, 0)]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert usage_of(answer) == (3, 20)


def test_what_keeps_state_is_generated_again_and_sent_once(mesh: Mesh) -> None:
    mesh.stage()
    undisturbed = mesh.stream(presence_penalty=1.0)
    mesh.stage(Fate("silent", 5), Fate("abort", 8))
    assert mesh.stream(presence_penalty=1.0) == undisturbed
    assert [attempt[:2] for attempt in mesh.attempts] == [(3, 0), (3, 5), (3, 8)]


def test_a_replica_that_says_something_else_is_not_believed(mesh: Mesh) -> None:
    mesh.stage(Fate("silent", 5), Fate("diverges"))
    answer = mesh.ask(presence_penalty=1.0)
    assert answer.status_code == 500
    assert "choices" not in answer.json()


def test_sequences_of_one_request_go_on_alone(mesh: Mesh) -> None:
    mesh.stage(Fate("silent", 4), Fate())
    answer = mesh.ask(n=2, temperature=1.0).json()
    assert [choice["text"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert len(mesh.attempts) == 3


def test_a_stop_string_across_the_cut(mesh: Mesh) -> None:
    mesh.stage(Fate("silent", MID_EMOJI + 6))
    text, _, reasons = mesh.stream(stop=["und 漢"])
    assert (text, reasons) == (TEXT[: TEXT.index("und")], ["stop"])
    assert len(mesh.attempts) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_kills_replicas_ends_with_an_error(mesh: Mesh, stream: bool) -> None:
    mesh.stage(Fate("engine dead", 4), always=Fate("engine dead", 0))
    answer = mesh.ask(stream=stream)
    attempts = mesh.attempts
    mesh.stage()
    # Its first replica gave tokens: only those after it count.
    assert [attempt[0] for attempt in attempts] == [3, 7, 7, 7][: len(attempts)]
    assert len(attempts) == 3
    if stream:  # tokens were sent: the error is an event
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert json.loads(events[-2])["error"]["code"] == 500
    else:
        assert "lost while they ran this request" in error_of(answer)["message"]


def test_no_replica_is_503_with_the_time_to_wait(mesh: Mesh) -> None:
    mesh.stage(always=Fate("refuses"))
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda stream: mesh.ask(stream=stream), [False, True]))
    mesh.stage()
    for answer in answers:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "no attention replica" in error_of(answer)["message"]


def test_experts_that_nobody_has_are_503_at_once(mesh: Mesh) -> None:
    mesh.stage(Fate("no experts", 3))
    answer = mesh.ask()
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "experts unavailable: layer 1" in error_of(answer)["message"]
    assert len(mesh.attempts) == 1


def test_a_replica_that_refuses_is_asked_again(mesh: Mesh) -> None:
    mesh.stage(Fate("refuses"), Fate("silent", 2), Fate("refuses"), Fate("refuses"))
    assert mesh.stream()[0] == TEXT
    assert [attempt[0] for attempt in mesh.attempts] == [3, 3, 5, 5, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_limit_is_429(mesh: Mesh, stream: bool) -> None:
    mesh.stage(always=Fate("waits", 2))
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        waiting = [pool.submit(mesh.ask) for _ in range(MAX_REQUESTS)]
        assert eventually(lambda: len(mesh.attempts) == MAX_REQUESTS)
        refused = mesh.ask(stream=stream)
        with (
            openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model="qwen3_moe", prompt=PROMPT, max_tokens=4)
        mesh.release()
        assert {answer.result().status_code for answer in waiting} == {200}
    mesh.stage()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 0
    assert "try again" in error_of(refused)["message"]
    assert mesh.ask().status_code == 200


def test_more_sequences_than_ever_fit_is_a_bad_request(mesh: Mesh) -> None:
    answer = mesh.ask(n=MAX_REQUESTS + 1, temperature=1.0)
    assert answer.status_code == 400
    assert "max_ongoing_requests" in error_of(answer)["message"]


def test_a_client_that_leaves_ends_the_attempt_that_runs(mesh: Mesh) -> None:
    mesh.stage(Fate("silent", 2), Fate("waits", 3))
    body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}
    with mesh.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # the connection closes with it
        next(lines)
        assert eventually(lambda: len(mesh.attempts) == 2)
    assert eventually(lambda: mesh.cancelled == 1), mesh.attempts
    mesh.release()
    assert len(mesh.attempts) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_time_is_up(mesh: Mesh, stream: bool) -> None:
    mesh.stage(Fate("silent", 2), Fate("waits", 3))
    body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": stream}
    body["return_token_ids"] = True
    answer = mesh.http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "1.5"})
    if stream:  # tokens were sent: the error is an event
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert json.loads(events[-2])["error"]["code"] == 504
        choices = [json.loads(event)["choices"][0] for event in events[:-2]]
        assert sum(len(choice["token_ids"]) for choice in choices) == 5
        assert TEXT.startswith("".join(choice["text"] for choice in choices))
    else:
        assert answer.status_code == 504
        assert "time that the client gave is up" in error_of(answer)["message"]
    assert eventually(lambda: mesh.cancelled == 1), mesh.attempts
    mesh.release()
    mesh.stage()
    assert mesh.http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "60"}).status_code == 200


def test_a_request_whose_time_is_up_before_it_begins_reaches_no_replica(mesh: Mesh) -> None:
    mesh.stage()
    body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 5}
    answer = mesh.http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "0.000001"})
    assert answer.status_code == 504
    assert "time was up" in error_of(answer)["message"]
    assert mesh.attempts == []


def test_a_lost_replica_is_seen_in_traces_and_logs(mesh: Mesh) -> None:
    mesh.stage(Fate("refuses"), Fate("silent", 4), Fate("refuses"), Fate("refuses"))
    answer = mesh.ask_traced(**{"X-Request-Id": "lost-and-found"})
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, TEXT)
    assert answer.headers.get_list("x-request-id") == ["lost-and-found"]
    mesh.traces.wait(lambda: len(mesh.traces.of(TRACE)) == 5)
    (server,) = mesh.traces.of(TRACE, "POST /v1/completions")
    assert server.parent_id == PARENT
    first, second = mesh.traces.of(TRACE, "attention")
    assert (first.failed, second.failed, second.links) == (True, False, [first.span_id])
    assert [
        (route.attributes["expertmesh.route.refusals"], route.failed) for route in mesh.traces.of(TRACE, "route")
    ] == [
        (1, False),
        (2, False),
    ]
    assert mesh.traces.of(TRACE, "route")[1].start_ns >= first.end_ns
    assert eventually(lambda: "lost its replica after 4" in mesh.logs(), 30)
    once = {line for line in mesh.logs().splitlines() if line.startswith('{"time"')}  # a line may be in both places
    lines = [json.loads(line) for line in once]
    (lost,) = [line for line in lines if "lost its replica" in line["message"] and line.get("trace_id") == TRACE]
    assert "after 4" in lost["message"]
    assert (lost["request_id"], lost["trace_id"], lost["deployment"]) == ("lost-and-found", TRACE, "ingress")
    assert (lost["level"], lost["logger"], lost["replica"] != "") == ("warning", "expertmesh.ingress", True)
    mesh.traces.spans.clear()


def test_a_client_that_leaves_and_a_request_without_a_replica_end_their_spans(mesh: Mesh) -> None:
    mesh.traces.spans.clear()
    mesh.stage(always=Fate("refuses"))
    answer = mesh.ask_traced()
    mesh.stage()
    assert answer.status_code == 503
    mesh.traces.wait(lambda: len(mesh.traces.of(TRACE)) == 2)
    server, route = mesh.traces.of(TRACE)
    assert (server.failed, server.attributes["error.type"]) == (True, "503")
    assert (route.failed, route.attributes["error.type"]) == (True, "GracefulHTTPError")
    mesh.traces.spans.clear()
    mesh.stage(Fate("waits", 3))
    body = {"model": "qwen3_moe", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with mesh.http.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
        next(stream.iter_lines())
    mesh.traces.wait(lambda: len(mesh.traces.of(TRACE, "attention")) == 1)
    (attention,) = mesh.traces.of(TRACE, "attention")
    assert (attention.failed, attention.attributes["expertmesh.stopped"]) == (False, True)
    mesh.release()
    mesh.traces.wait(lambda: len(mesh.traces.of(TRACE)) == 3)
    mesh.traces.spans.clear()


def test_what_a_replica_that_stops_could_not_finish_goes_on_elsewhere(mesh: Mesh) -> None:
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:

        def waiting() -> list[Future[tuple[str, tuple[int, int], list[str]]]]:
            mesh.stage(always=Fate("waits", MID_EMOJI))
            streams = [pool.submit(mesh.stream) for _ in range(MAX_REQUESTS)]
            assert eventually(lambda: len(mesh.attempts) == MAX_REQUESTS)
            return streams

        streams = waiting()
        while mesh.asked < REPLICAS:  # Serve's router goes by what it knew of queues up to 10 s ago
            mesh.release()
            wait(streams)
            streams = waiting()
        mesh.scale(1)
        assert eventually(lambda: len(mesh.attempts) > MAX_REQUESTS)
        mesh.release()
        assert {stream.result()[0] for stream in streams} == {TEXT}
    assert {attempt[0] for attempt in mesh.attempts} == {len(PROMPT), len(PROMPT) + MID_EMOJI}
