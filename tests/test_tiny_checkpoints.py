"""The tiny checkpoints that the engine tests run on: written, sound, and laid out as published ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.checkpoints import (
    EOS,
    FAMILIES,
    VOCAB,
    write_family,
    write_medium_moe,
    write_swapped_experts,
)
from expertmesh.platform.checkpoints import Checkpoint, check_checkpoint, expert_layout, open_checkpoint

GATE_UP_DOWN = tuple(f"mlp.experts.{{}}.{kind}_proj.weight" for kind in ("down", "gate", "up"))
MIXTRAL = tuple(f"block_sparse_moe.experts.{{}}.{kind}.weight" for kind in ("w1", "w2", "w3"))
GPT_OSS = tuple(f"mlp.experts.{kind}" for kind in ("down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"))

# family -> layers with routed experts, experts a layer, fused, names below `model.layers.L.`
LAYOUTS: dict[str, tuple[tuple[int, ...], int, bool, tuple[str, ...]]] = {
    "qwen3_moe": ((0, 1, 2), 8, False, GATE_UP_DOWN),
    "qwen2_moe": ((0, 1, 2), 10, False, GATE_UP_DOWN),
    "mixtral": ((0, 1, 2), 8, False, MIXTRAL),
    "gpt_oss": ((0, 1, 2, 3), 8, True, GPT_OSS),
    "glm4_moe": ((1, 2), 8, False, GATE_UP_DOWN),
    "olmoe": ((0, 1, 2), 8, False, GATE_UP_DOWN),
    "flex_olmo": ((0, 1, 2), 8, False, GATE_UP_DOWN),
    "deepseek_v3": ((1, 2), 8, False, GATE_UP_DOWN),
    "gemma3": ((), 0, False, ()),
    "olmo2": ((), 0, False, ()),
}
SHARED_EXPERTS = {
    "qwen2_moe": "model.layers.0.mlp.shared_expert.up_proj.weight",
    "glm4_moe": "model.layers.1.mlp.shared_experts.up_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.shared_experts.up_proj.weight",
}


def test_every_family_is_described() -> None:
    assert tuple(LAYOUTS) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_family(tmp_path: Path, family: str) -> None:
    checkpoint = check_checkpoint(write_family(family, tmp_path))
    layers, experts, fused, names = LAYOUTS[family]
    layout = expert_layout(checkpoint)
    assert (layout.layers, layout.num_experts, layout.fused) == (layers, experts, fused)
    for layer in layers:
        for expert in range(experts):
            expected = tuple(f"model.layers.{layer}.{name}".format(expert) for name in names)
            assert layout.names(layer, expert) == expected
    assert checkpoint.config["max_position_embeddings"] >= 512
    if family in SHARED_EXPERTS:
        assert SHARED_EXPERTS[family] in checkpoint.tensors
        assert not layout.is_expert(SHARED_EXPERTS[family])
    if layers:
        assert layout.total_expert_bytes < checkpoint.total_bytes
    assert_every_tensor_is_random(checkpoint)


def assert_every_tensor_is_random(checkpoint: Checkpoint) -> None:
    """No tensor was left at the ones and zeros, or the garbage, that it was allocated with."""
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        assert torch.isfinite(tensor).all(), name
        assert 0.005 < tensor.std().item() < 3.0, name


def test_family_facts_that_the_engine_needs(tmp_path: Path) -> None:
    deepseek = open_checkpoint(write_family("deepseek_v3", tmp_path / "deepseek"))
    wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert wanted.items() <= deepseek.config.items()
    assert deepseek.config["rope_parameters"]["rope_type"] == "yarn"
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in deepseek.tensors
    gpt_oss = open_checkpoint(write_family("gpt_oss", tmp_path / "gpt_oss"))
    assert gpt_oss.config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert gpt_oss.config["sliding_window"] == 32
    assert "model.layers.0.self_attn.sinks" in gpt_oss.tensors
    assert open_checkpoint(write_family("mixtral", tmp_path / "mixtral")).config["sliding_window"] == 32


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        open_checkpoint(write_family("qwen3_moe", tmp_path / name, seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for name in first.tensors:
        assert torch.equal(first.read(name), again.read(name))
        assert not torch.equal(first.read(name), other.read(name))


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family 'gpt2', known are qwen3_moe, "):
        write_family("gpt2", tmp_path)


def test_tokenizer(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCAB == open_checkpoint(folder).config["vocab_size"]
    assert tokenizer.eos_token_id == open_checkpoint(folder).config["eos_token_id"]
    text = "The router sends tökens to 専門家 🦊\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("The router sends every token")) < len("The router sends every token") // 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == f"<|turn|>user\nHi{EOS}\n<|turn|>assistant\n"
    assert tokenizer.eos_token_id in tokenizer.encode(chat)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_swapped_experts(tmp_path: Path, family: str) -> None:
    sound = open_checkpoint(write_family(family, tmp_path / "sound"))
    swapped = check_checkpoint(write_swapped_experts(sound.folder, tmp_path / "swapped", 1, 2, 5))
    layout = expert_layout(sound)
    touched = {name for expert in (2, 5) for name in layout.names(1, expert)}
    for name in sound.tensors:
        assert torch.equal(sound.read(name), swapped.read(name)) is (name not in touched)
    for two, five in zip(layout.names(1, 2), layout.names(1, 5), strict=True):
        if layout.fused:
            assert torch.equal(sound.read_rows(two, [2, 5]), swapped.read_rows(two, [5, 2]))
            assert torch.equal(sound.read_rows(two, [0, 1, 3, 4]), swapped.read_rows(two, [0, 1, 3, 4]))
        else:
            assert torch.equal(sound.read(two), swapped.read(five))
            assert torch.equal(sound.read(five), swapped.read(two))


def test_medium_moe_scaled_down(tmp_path: Path) -> None:
    checkpoint = check_checkpoint(
        write_medium_moe(tmp_path, layers=2, experts=6, top_k=4, hidden=128, expert_inner=32, vocab=512)
    )
    layout = expert_layout(checkpoint)
    assert (layout.layers, layout.num_experts) == ((0, 1), 6)
    assert layout.expert_bytes(0, 0) == 3 * 128 * 32 * 4
    assert checkpoint.config["num_experts_per_tok"] == 4
