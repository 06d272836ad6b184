"""What the cut is calibrated on: prose windows, and conversations of the dense model with itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from expertmesh.platform.checkpoints.demo.recipe import Recipe
from expertmesh.platform.checkpoints.demo.texts import CHAT_PROMPTS, collect, token_windows


@dataclass(frozen=True)
class TokenBatch:
    """tokens [B, L] int64, padded on the right; valid [B, L] bool: which of them count."""

    tokens: Tensor
    valid: Tensor


def calibration_batch(
    model: LlamaForCausalLM, tokenizer: Any, recipe: Recipe, progress: Callable[[float], None]
) -> TokenBatch:
    """The recipe's text windows and one answered conversation for each of CHAT_PROMPTS.

    The same on every call on the same machine; other processors may sample other answers. `progress` gets 0 to 1.
    """
    windows = token_windows(collect().calibration, tokenizer, recipe.window_tokens, recipe.text_windows, recipe.seed)
    chats = answered_prompts(model, tokenizer, recipe, progress)
    return pad_right([*windows, *(chat[: recipe.window_tokens] for chat in chats)])


def pad_right(sequences: list[list[int]]) -> TokenBatch:
    """Sequences of any lengths above 0 as one batch. Causal attention keeps padding on the right from being seen."""
    length = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), length, dtype=torch.long)
    valid = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        valid[row, : len(sequence)] = True
    return TokenBatch(tokens, valid)


def answered_prompts(
    model: LlamaForCausalLM, tokenizer: Any, recipe: Recipe, progress: Callable[[float], None]
) -> list[list[int]]:
    """CHAT_PROMPTS in the chat template, each with the model's sampled answer up to its end token."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)["input_ids"]
        for prompt in CHAT_PROMPTS
    ]
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    end = model.config.eos_token_id
    generates: Any = model  # transformers declares `generate` for a protocol that its own classes don't satisfy.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        answered = generates.generate(
            input_ids=torch.tensor([[end] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            max_new_tokens=recipe.chat_new_tokens,
            do_sample=True,
            temperature=recipe.chat_temperature,
            stopping_criteria=StoppingCriteriaList([_Progress(width, recipe.chat_new_tokens, progress)]),
        )
    conversations = []
    for row, pad in zip(answered.tolist(), padding, strict=True):
        answer = row[width:]
        length = answer.index(end) + 1 if end in answer else len(answer)
        conversations.append(row[pad:width] + answer[:length])
    return conversations


class _Progress(StoppingCriteria):
    """Never stops anything: generation calls it once a token."""

    def __init__(self, prompt_width: int, new_tokens: int, progress: Callable[[float], None]) -> None:
        self._prompt_width = prompt_width
        self._new_tokens = new_tokens
        self._progress = progress

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self._progress((input_ids.shape[1] - self._prompt_width) / self._new_tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool)
