"""What a request looks like at its next replica, and how long it looks for one. No engine, no Ray."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from expertmesh.deployments.ingress.attempt import NotTaken, QueuesFull, ReplicaLost
from expertmesh.deployments.ingress.continuation import Diverged, Engines, Unseen, Way, continued, way_of
from expertmesh.deployments.ingress.search import MAX_DEATHS, Patience, Search

PROMPT, KNOWN = [5, 6, 7], [100, 101, 102, 103]
ENGINES = Engines()


def request(prompt: list[int] | None = PROMPT, embedded: list[bool] | None = None, **params: Any) -> EngineCoreRequest:
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 50, **params})
    return EngineCoreRequest(
        "r", prompt, None, sampling, None, 0.0, None, None, None, prompt_is_token_ids=embedded, external_req_id="r"
    )


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"seed": 3},  # greedy: the seed is never used
        {"temperature": 0.8, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"stop": ["x"], "stop_token_ids": [9], "min_tokens": 7},
        {"logprobs": 3, "logit_bias": {4: 1.0}, "allowed_token_ids": [1, 2]},
    ],
)
def test_what_depends_on_tokens_only_is_resubmitted(params: dict[str, Any]) -> None:
    assert way_of(request(**params), ENGINES) is Way.RESUBMIT


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "seed": 3},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"bad_words": ["x"]},
        {"thinking_token_budget": 20},
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=2)},
        {"watermarking": True},
    ],
)
def test_what_keeps_state_is_regenerated(params: dict[str, Any]) -> None:
    assert way_of(request(**params), ENGINES) is Way.REGENERATE
    assert way_of(request(**params), Engines(can_force=False)) is Way.NONE


def test_prompts_that_are_no_tokens_are_not_extended() -> None:
    assert way_of(request(None), ENGINES) is Way.REGENERATE
    assert way_of(request(PROMPT, [True, False, True]), ENGINES) is Way.REGENERATE


def test_processors_of_the_user_may_keep_state() -> None:
    assert way_of(request(), Engines(stateful_processors=True)) is Way.REGENERATE


def test_resubmission_counts_what_was_said() -> None:
    original = request(min_tokens=6, prompt_logprobs=2)
    again = continued(original, KNOWN, Way.RESUBMIT)
    assert again.prompt_token_ids == PROMPT + KNOWN
    params = again.sampling_params
    assert params is not None
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs) == (46, 2, None)
    assert params.trace_decode_token_ids is None
    assert original.prompt_token_ids == PROMPT
    assert original.sampling_params is not None
    assert (original.sampling_params.max_tokens, original.sampling_params.prompt_logprobs) == (50, 2)


def test_least_tokens_that_were_said_already() -> None:
    params = continued(request(min_tokens=2), KNOWN, Way.RESUBMIT).sampling_params
    assert params is not None
    assert params.min_tokens == 0


def test_regeneration_asks_the_same_again() -> None:
    original = request(min_tokens=6, presence_penalty=1.0, prompt_logprobs=2)
    again = continued(original, KNOWN, Way.REGENERATE)
    assert again.prompt_token_ids == PROMPT
    params = again.sampling_params
    assert params is not None
    assert (params.max_tokens, params.min_tokens, params.prompt_logprobs) == (50, 6, None)
    assert params.trace_decode_token_ids == KNOWN


@pytest.mark.parametrize("way", Way)
def test_before_its_first_token_a_request_is_asked_as_it_was(way: Way) -> None:
    original = request(prompt_logprobs=1)
    assert continued(original, [], way) == original


def test_what_can_not_go_on_is_not_asked() -> None:
    with pytest.raises(ValueError, match="4 tokens"):
        continued(request(), KNOWN, Way.NONE)


def out(*tokens: int, finish: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput("r", list(tokens), finish_reason=finish)


def test_known_tokens_are_let_through_once() -> None:
    unseen = Unseen(KNOWN)
    assert unseen.of([out(100), out(101)]) == []
    assert unseen.of([]) == []
    assert unseen.of([out(102), out(103), out(104)]) == [out(104)]
    assert unseen.of([out(100, finish=FinishReason.STOP)]) == [out(100, finish=FinishReason.STOP)]
    assert Unseen(()).of([out(100)]) == [out(100)]


@pytest.mark.parametrize("wrong", [out(99), out(100, finish=FinishReason.STOP), out(100, 101, 102, 103, 104)])
def test_another_token_than_the_known_one_is_an_error(wrong: EngineCoreOutput) -> None:
    with pytest.raises(Diverged):
        Unseen(KNOWN).of([wrong])


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def search(replica_s: float = 30.0) -> tuple[Search, Clock]:
    clock = Clock()
    return Search(Patience(replica_s, 60.0), clock), clock


def status_of(refused: pytest.ExceptionInfo[GracefulHTTPError]) -> int:
    return int(refused.value.http_status)


def test_pauses_grow_until_the_time_is_up() -> None:
    looking, clock = search()
    pauses = [0.0]
    while looking.left_s > 2.0:
        pauses.append(looking.refused(NotTaken("gone")))
        clock.now += pauses[-1]
    assert pauses[:5] == [0.0, 0.05, 0.1, 0.2, 0.4]
    assert max(pauses) == 2.0
    with pytest.raises(GracefulHTTPError, match="no attention replica took the request in 30 s: gone") as refused:
        looking.refused(NotTaken("gone"))
    assert status_of(refused) == 503


def test_full_queues_refuse_who_comes_and_not_who_lost_a_replica() -> None:
    looking, _ = search()
    with pytest.raises(GracefulHTTPError) as refused:
        looking.refused(QueuesFull("full"))
    assert status_of(refused) == 429
    looking, _ = search()
    looking.taken()
    looking.lost(ReplicaLost("gone"))
    assert looking.refused(QueuesFull("full")) > 0


def test_a_lost_replica_starts_the_search_anew() -> None:
    looking, clock = search()
    clock.now += 29
    looking.taken()
    clock.now += 1000
    looking.lost(ReplicaLost("gone"))
    assert looking.left_s == 30


def test_deaths_count_until_there_is_a_new_token() -> None:
    looking, _ = search()
    for _ in range(10):
        looking.taken()
        for _ in range(MAX_DEATHS - 1):
            looking.lost(ReplicaLost("gone"))
        looking.progressed()
    for _ in range(MAX_DEATHS - 1):
        looking.lost(ReplicaLost("gone"))
    with pytest.raises(GracefulHTTPError, match="gone") as refused:
        looking.lost(ReplicaLost("gone"))
    assert status_of(refused) == 500
