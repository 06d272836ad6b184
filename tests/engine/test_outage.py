"""An expert that no shard serves: its requests end, the engine and its other requests live on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bare import EngineHost, Worker, bare_mesh, engine_arguments
from benchmarks.parity import prompts_for, vocabulary_of
from expertmesh.routing.vllm_plugin.scheduler import requests_of

PROMPTS, PROMPT_TOKENS, TOKENS = 32, 3, 4


@pytest.mark.engine
def test_requests_without_the_missing_expert_are_answered_and_the_engine_lives_on(
    family: Callable[[str], Path],
) -> None:
    folder = family("qwen3_moe")
    prompts = [prompt[:PROMPT_TOKENS] for prompt in prompts_for(vocabulary_of(folder), PROMPTS)]
    with bare_mesh(folder, 2, unavailable_timeout_s=0.5) as (mesh, _):
        arguments = {**engine_arguments(folder, enable_prefix_caching=True), **mesh.engine_arguments()}
        with Worker(EngineHost, arguments, 1) as engine:
            undisturbed = engine.ask("generate", prompts, TOKENS)
            targets = mesh.targets
            slots = mesh.even_slots(2, 1)
            gone = np.argwhere(slots[1] >= 0)[0]
            without = slots.copy()
            without[1, gone[0], gone[1]] = -1
            mesh.publish(without, targets)
            disturbed = engine.ask("generate", prompts, TOKENS)
            complete = [len(answer.tokens) == TOKENS for answer in disturbed]
            assert 0 < sum(complete) < PROMPTS
            for before, after, whole in zip(undisturbed, disturbed, complete, strict=True):
                assert after.tokens == before.tokens[: len(after.tokens)]
                assert after.finish_reason == ("length" if whole else "error")
            mesh.publish(slots, targets)
            healed = engine.ask("generate", prompts, TOKENS)
            assert [answer.tokens for answer in healed] == [answer.tokens for answer in undisturbed]


def test_rows_belong_to_the_requests_in_their_order() -> None:
    requests = [("a", 3), ("b", 0), ("c", 1), ("d", 2)]
    assert requests_of([0], requests) == {"a"}
    assert requests_of([2, 3], requests) == {"a", "c"}
    assert requests_of([4, 5], requests) == {"d"}
    assert requests_of([6, 90], requests) == set(), "padding"
