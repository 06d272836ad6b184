"""Forced regeneration: an engine generates tokens that are known, so that its state is as if it had chosen them.

A request that goes on at another replica needs there what its first replica kept outside the tokens: the random
generator's position, counts for penalties, a grammar's state. Generating the known tokens once more, each step's choice
forced, brings all of it about, with no code for any of it. It costs one decode step a known token.

The tokens travel in `SamplingParams.trace_decode_token_ids`, vLLM's own field for this, which no client can set. vLLM's
own implementation is in its second model runner only; `KnownTokens` is the same for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

_NAME = f"{__name__}:KnownTokens"


class KnownTokens(AdapterLogitsProcessor):
    """Leaves one choice at each step of a request for which tokens are known, and none of its business after them."""

    def is_argmax_invariant(self) -> bool:
        """False: it decides greedy choices too."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """What vLLM calls at each step with the tokens so far and the logits [vocabulary]."""
        known = params.trace_decode_token_ids
        if not known:
            return None

        def force(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(tokens) < len(known):
                # No other finite value is left: temperature, top-k, top-p and penalties can't change the choice.
                logits.fill_(float("-inf"))
                logits[known[len(tokens)]] = 0.0
            return logits

        return force


def can_force(engine_arguments: Mapping[str, object]) -> bool:
    """Whether an engine with these arguments of vLLM can regenerate: not with speculative decoding (vLLM's limit)."""
    return engine_arguments.get("speculative_config") is None


def let_force(config: VllmConfig) -> None:
    """Changes an engine's config so that it regenerates known tokens; must be called before the engine starts."""
    if config.speculative_config is not None:
        return
    model = config.model_config
    if config.use_v2_model_runner:
        model.enable_trace_replay = True
    else:
        # Last, so that processors of the user's see what they saw before, and can't take the choice back.
        model.logits_processors = [*(model.logits_processors or ()), _NAME]
