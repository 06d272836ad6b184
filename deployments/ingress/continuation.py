"""How a request goes on at another replica: pure functions from a request and its tokens so far to the next request.

* **Resubmission**: the tokens so far become part of the prompt. The new replica computes them in one prefill, or finds
  them cached. Exact where the next token depends on nothing but the tokens before it.
* **Regeneration**: the same request once more, with the known tokens forced (deployments/attention/known_tokens.py).
  Exact for everything that moves with the tokens generated: seeded generators, presence and frequency penalties (which
  don't count a prompt), grammars, bad words, a thinking budget, repetition detection, logits processors of the user's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm import SamplingParams
from vllm.sampling_params import SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest


class Way(StrEnum):
    """How a request that has tokens already goes on."""

    RESUBMIT = "resubmit"
    REGENERATE = "regenerate"
    NONE = "none"
    """It can't: its replicas can't force tokens."""


@dataclass(frozen=True, slots=True)
class Engines:
    """What the replicas' engines are like."""

    can_force: bool = True
    """They can be made to generate known tokens."""
    stateful_processors: bool = False
    """They run logits processors of the user's, which may keep state of what was generated."""


class Diverged(Exception):
    """A replica did not generate the known tokens that it was forced to: what it would say next can't be trusted."""


def way_of(request: EngineCoreRequest, engines: Engines) -> Way:
    """How this request goes on once it has tokens."""
    embedded = request.prompt_token_ids is None or request.prompt_is_token_ids is not None
    assert request.sampling_params is not None, "requests that generate no tokens start again"
    if not embedded and not engines.stateful_processors and not _keeps_state(request.sampling_params):
        return Way.RESUBMIT
    return Way.REGENERATE if engines.can_force else Way.NONE


def continued(request: EngineCoreRequest, known: Sequence[int], way: Way) -> EngineCoreRequest:
    """The request that makes a new replica go on after `known`. Does not modify `request`.

    ValueError for Way.NONE, where `known` is not empty.
    """
    attempt = copy.copy(request)
    if not known:
        return attempt
    if way is Way.NONE:
        raise ValueError(f"request {request.request_id} can't go on after {len(known)} tokens")
    assert request.sampling_params is not None
    params = copy.copy(request.sampling_params)
    # Sent with the first token, and once is enough.
    params.prompt_logprobs = params.prompt_logprob_token_ids = params.prompt_logprob_start = None
    if way is Way.RESUBMIT:
        assert request.prompt_token_ids is not None
        assert params.max_tokens is not None, "vLLM's input processor sets it"
        attempt.prompt_token_ids = [*request.prompt_token_ids, *known]
        params.max_tokens -= len(known)
        params.min_tokens = max(0, params.min_tokens - len(known))
    else:
        params.trace_decode_token_ids = list(known)
    attempt.sampling_params = params
    return attempt


class Unseen:
    """Takes the outputs of one attempt and lets through what the client has not had."""

    def __init__(self, regenerated: Sequence[int]) -> None:
        """regenerated: the tokens that the attempt will say once more; none if it was resubmitted."""
        self._regenerated = tuple(regenerated)
        self._seen = 0

    def of(self, outputs: Sequence[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """The outputs that are new. Raises Diverged if a regenerated token is not the known one."""
        return [output for output in outputs if not self._again(output)]

    def _again(self, output: EngineCoreOutput) -> bool:
        begin, end = self._seen, self._seen + len(output.new_token_ids)
        if begin == len(self._regenerated):
            return False
        if tuple(output.new_token_ids) != self._regenerated[begin:end] or output.finish_reason is not None:
            raise Diverged(f"token {begin} of {len(self._regenerated)} known ones came out differently")
        self._seen = end
        return True


def _keeps_state(params: SamplingParams) -> bool:
    return (
        params.sampling_type is SamplingType.RANDOM_SEED
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.structured_outputs is not None
        or bool(params.bad_words)
        or params.thinking_token_budget is not None
        or params.repetition_detection is not None
        or bool(params.watermarking)
    )
