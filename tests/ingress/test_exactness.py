"""A real engine goes on after known tokens exactly as the one that chose them would have: each kind of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.bare import Worker
from expertmesh.deployments.ingress.continuation import Way
from tests.ingress.engine_host import CHUNK_TOKENS, EngineHost, Said

pytestmark = pytest.mark.engine

PROMPT = [40, 77, 301, 12, 99, 260, 18, 311, 54, 130]
TOKENS = 40
CUTS = (1, 7, 23)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "sizes": {"type": "array", "maxItems": 4}},
    "required": ["name", "sizes"],
}
KINDS: dict[str, tuple[Way, dict[str, Any]]] = {
    "greedy": (Way.RESUBMIT, {}),
    "least tokens": (Way.RESUBMIT, {"min_tokens": 30, "stop_token_ids": list(range(0, 384, 3))}),
    "repetition penalty": (Way.RESUBMIT, {"repetition_penalty": 1.3}),
    "biased": (Way.RESUBMIT, {"logit_bias": {70: 3.0, 71: 3.0}, "allowed_token_ids": list(range(60, 200))}),
    "seeded": (Way.REGENERATE, {"temperature": 1.0, "seed": 7}),
    "seeded top-p": (Way.REGENERATE, {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "seed": 8}),
    "presence": (Way.REGENERATE, {"presence_penalty": 1.2}),
    "frequency": (Way.REGENERATE, {"frequency_penalty": 0.7, "temperature": 1.0, "seed": 9}),
    "all penalties": (
        Way.REGENERATE,
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "min_tokens": 25},
    ),
    "JSON": (Way.REGENERATE, {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}),
    "seeded grammar": (
        Way.REGENERATE,
        {"structured_outputs": {"regex": "([a-f]{2}😀|漢字){9}x"}, "temperature": 1.0, "seed": 5, "max_tokens": 200},
    ),
    "bad words": (Way.REGENERATE, {"bad_words": ["e", "th", "the"]}),
}
STATELESS = [name for name, (way, _) in KINDS.items() if way is Way.RESUBMIT]


@pytest.fixture(scope="module")
def engine(family: Callable[[str], Path]) -> Iterator[Worker]:
    with Worker(EngineHost, family("qwen3_moe")) as worker:
        yield worker


def settings(kind: str) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": TOKENS, "logprobs": 1, **KINDS[kind][1]}


def say(engine: Worker, kind: str, known: tuple[int, ...] = (), way: Way | None = None) -> Said:
    said: Said = engine.ask("say", PROMPT, settings(kind), known, way or KINDS[kind][0])
    return said


def test_an_engine_tells_what_autoscaling_goes_by(engine: Worker) -> None:
    busy = engine.ask("load_while_it_answers", PROMPT)
    assert busy["waiting"] == 0
    assert 0 < busy["kv_use"] < 1
    assert busy["ttft_s"] > 0
    idle = engine.ask("load")
    assert idle["kv_use"] == idle["waiting"] == 0
    assert idle["ttft_s"] > 0, "of late"


def test_a_seed_counts_from_the_first_token_however_the_prompt_was_computed(engine: Worker) -> None:
    """In chunks first, which ended vLLM's engine on CPU, then mostly from the prefix cache."""
    prompt = [20 + (7 * i) % 300 for i in range(2 * CHUNK_TOKENS + 22)]
    asked = {"temperature": 1.0, "seed": 11, "max_tokens": 20, "logprobs": 1}
    in_chunks: Said = engine.ask("say", prompt, asked, (), Way.REGENERATE)
    in_one: Said = engine.ask("say", prompt, asked, (), Way.REGENERATE)
    assert len(in_one.tokens) == 20
    assert in_chunks.tokens == in_one.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_as_if_nothing_had_happened(engine: Worker, kind: str) -> None:
    whole = say(engine, kind)
    assert len(whole.tokens) > max(CUTS)
    assert engine.ask("way", PROMPT, settings(kind)) == KINDS[kind][0]
    for cut in (*CUTS, len(whole.tokens) - 1):
        rest = say(engine, kind, whole.tokens[:cut])
        assert whole.tokens[:cut] + rest.tokens == whole.tokens
        assert (rest.finish_reason, rest.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-3)


def test_state_is_why_some_kinds_regenerate(engine: Worker) -> None:
    for kind in ("seeded", "presence", "JSON"):
        whole = say(engine, kind)
        resubmitted = [say(engine, kind, whole.tokens[:cut], Way.RESUBMIT).tokens for cut in CUTS]
        assert resubmitted != [whole.tokens[cut:] for cut in CUTS], kind


def test_regeneration_is_exact_for_kinds_without_state_too(engine: Worker) -> None:
    for kind in STATELESS:
        whole = say(engine, kind)
        assert say(engine, kind, whole.tokens[:7], Way.REGENERATE).tokens == whole.tokens[7:], kind


def test_an_engine_that_hangs_is_noticed_and_can_be_killed(engine: Worker) -> None:
    """The last test: the engine is gone after it."""
    processes = [psutil.Process(pid) for pid in engine.ask("pids")]
    assert processes
    while_it_waits, once_it_left = engine.ask("hang", PROMPT)
    assert "gave no output for 6 s" in while_it_waits
    assert once_it_left == while_it_waits
    assert not any(process.is_running() for process in processes)
