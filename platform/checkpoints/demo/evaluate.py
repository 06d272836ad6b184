"""How much the cut costs: perplexity of both models on text that the calibration never saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own idiom)
from transformers import AutoTokenizer, Qwen2MoeForCausalLM

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.demo.source import gguf_path, load_dense
from expertmesh.platform.checkpoints.demo.texts import collect, token_windows

_WINDOW_TOKENS = 256
_SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """`held_out_tokens` is how many were predicted; `routed_share` the neurons outside the shared expert, 0 to 1."""

    dense_perplexity: float
    moe_perplexity: float
    ratio: float
    held_out_tokens: int
    experts: int
    top_k: int
    routed_share: float


def evaluate(folder: Path, windows: int = 24) -> Evaluation:
    """Both models in float32 on `windows` held-out windows of 256 tokens, each predicted from its own start.

    Raises CheckpointError if `folder` holds no demo checkpoint.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no demo checkpoint (config.json is missing); build it with demo_checkpoint()")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(token_windows(collect().held_out, tokenizer, _WINDOW_TOKENS, windows, _SEED))
    dense = perplexity(load_dense(gguf_path()), tokens)
    moe = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = moe.config
    ours = perplexity(moe, tokens)
    routed = config.num_experts * config.moe_intermediate_size
    return Evaluation(
        dense_perplexity=dense,
        moe_perplexity=ours,
        ratio=ours / dense,
        held_out_tokens=len(tokens) * (_WINDOW_TOKENS - 1),
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        routed_share=routed / (routed + config.shared_expert_intermediate_size),
    )


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """`exp` of the mean negative log-likelihood of every token but the first of each row; tokens [B, L] int64."""
    total = 0.0
    for rows in tokens.split(4):
        logits = model(input_ids=rows).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / tokens[:, 1:].numel())
