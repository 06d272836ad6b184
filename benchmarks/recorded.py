"""Loads of the demo model's experts on two subjects, by its own router, without an engine."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.platform.checkpoints.demo import demo_checkpoint

_TOKENS, _WINDOW = 2048, 256
_CODE = ("argparse.py", "tarfile.py", "inspect.py", "subprocess.py")

Floats = np.ndarray[Any, np.dtype[np.float64]]


def demo_loads() -> tuple[Floats, Floats]:
    """Tokens of each (layer, expert) on prose and on Python code: two arrays [layers, experts].

    The demo checkpoint is built if it isn't in $EXPERTMESH_CACHE, else ~/.cache/expertmesh.
    """
    from transformers import AutoTokenizer, Qwen2MoeForCausalLM

    from expertmesh.platform.checkpoints.demo.texts import collect

    cache = os.environ.get("EXPERTMESH_CACHE") or "~/.cache/expertmesh"
    folder = demo_checkpoint(Path(cache).expanduser())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    library = Path(sysconfig.get_path("stdlib"))
    code = [(library / name).read_text(encoding="utf-8") for name in _CODE]
    return _recorded(model, tokenizer, collect().held_out), _recorded(model, tokenizer, code)


@torch.no_grad()
def _recorded(model: Any, tokenizer: Any, texts: Sequence[str]) -> Floats:
    """Counts of the router's choices over the first _TOKENS tokens of the texts, in windows: [layers, experts]."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= _TOKENS:
            break
        ids += tokenizer(text)["input_ids"]
    windows = torch.tensor(ids[:_TOKENS]).view(-1, _WINDOW)
    config = model.config
    counts = np.zeros((config.num_hidden_layers, config.num_experts))
    for rows in windows.split(4):
        logits = model.model(input_ids=rows, output_router_logits=True).router_logits
        for layer, of_layer in enumerate(logits):
            chosen = of_layer.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            counts[layer] += np.bincount(chosen.numpy(), minlength=config.num_experts)
    return counts
