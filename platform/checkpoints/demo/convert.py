"""The dense model's layers turned into Mixture-of-Experts layers, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own idiom)
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2MoeConfig

from expertmesh.platform.checkpoints.demo.calibration import TokenBatch
from expertmesh.platform.checkpoints.demo.recipe import Recipe
from expertmesh.platform.checkpoints.demo.slicing import SlicedBlock, SliceSettings, slice_block

_ATTENTION_CHUNK = 8
"""Sequences a pass, so that the attention's temporaries stay in the processor's cache."""


@torch.no_grad()
def moe_state(
    model: LlamaForCausalLM, calibration: TokenBatch, recipe: Recipe, progress: Callable[[float], None]
) -> dict[str, Tensor]:
    """Tensors of a Qwen2MoeForCausalLM (float32, by checkpoint name) that stands in for `model`.

    Each layer is calibrated on what the already cut layers before it put out, so it sees the inputs that it will see in
    use. `progress` gets 0 to 1.
    """
    settings = _settings(recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    decoder = model.model
    states = decoder.embed_tokens(calibration.tokens)
    positions = decoder.rotary_emb(states[:1], torch.arange(states.shape[1])[None])
    tensors = {"model.embed_tokens.weight": decoder.embed_tokens.weight, "model.norm.weight": decoder.norm.weight}
    for index, layer in enumerate(decoder.layers):
        _attend(layer, states, positions)
        hidden = layer.post_attention_layernorm(states[calibration.valid])
        activations = F.silu(layer.mlp.gate_proj(hidden), inplace=True).mul_(layer.mlp.up_proj(hidden))
        block, output = slice_block(hidden, activations, layer.mlp.down_proj.weight, settings, generator)
        states[calibration.valid] += output
        tensors |= _layer_tensors(f"model.layers.{index}.", layer, block, recipe.top_k)
        progress((index + 1) / len(decoder.layers))
    return tensors


def moe_config(model: LlamaForCausalLM, recipe: Recipe) -> Qwen2MoeConfig:
    """The config that goes with `moe_state`, for weights stored in bfloat16."""
    dense = model.config
    routed = dense.intermediate_size - recipe.shared_neurons
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dense.rope_parameters,
        tie_word_embeddings=True,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=routed // recipe.experts,
        shared_expert_intermediate_size=recipe.shared_neurons,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        qkv_bias=True,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )


def _settings(recipe: Recipe) -> SliceSettings:
    return SliceSettings(
        experts=recipe.experts,
        top_k=recipe.top_k,
        shared_neurons=recipe.shared_neurons,
        router_ridge=recipe.router_ridge,
        router_spread=recipe.router_spread,
        shared_ridge=recipe.shared_ridge,
        profile_tokens=recipe.profile_tokens,
        profile_dimensions=recipe.profile_dimensions,
        cluster_rounds=recipe.cluster_rounds,
    )


def _attend(layer: Any, states: Tensor, positions: tuple[Tensor, Tensor]) -> None:
    """Adds the layer's attention to `states` [B, L, H] in place."""
    for chunk in states.split(_ATTENTION_CHUNK):
        normed = layer.input_layernorm(chunk)
        # Without a mask, transformers' scaled dot-product attention is causal.
        chunk += layer.self_attn(normed, position_embeddings=positions, attention_mask=None)[0]


def _layer_tensors(prefix: str, layer: Any, block: SlicedBlock, top_k: int) -> dict[str, Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    tensors = {
        "input_layernorm.weight": layer.input_layernorm.weight,
        "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        "self_attn.o_proj.weight": attention.o_proj.weight,
        "mlp.gate.weight": block.router,
        # A gate of zeros lets sigmoid(0) = 1/2 of the shared expert through; its down projection makes up for it.
        "mlp.shared_expert_gate.weight": torch.zeros(1, block.router.shape[1]),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        tensors[f"self_attn.{name}.weight"] = weight
        # Qwen2-MoE has biases here and Llama has none.
        tensors[f"self_attn.{name}.bias"] = torch.zeros(len(weight))
    down = mlp.down_proj.weight
    tensors |= _expert_tensors("mlp.shared_expert.", mlp, block.shared, 2 * block.shared_down)
    for expert, neurons in enumerate(block.groups):
        # The k chosen weights sum to 1, so each expert is as strong as in the dense block only k times over.
        tensors |= _expert_tensors(f"mlp.experts.{expert}.", mlp, neurons, top_k * down[:, neurons])
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _expert_tensors(prefix: str, mlp: Any, neurons: Tensor, down: Tensor) -> dict[str, Tensor]:
    return {
        prefix + "gate_proj.weight": mlp.gate_proj.weight[neurons],
        prefix + "up_proj.weight": mlp.up_proj.weight[neurons],
        prefix + "down_proj.weight": down,
    }
