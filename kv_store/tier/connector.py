"""vLLM's OffloadingConnector, told whose requests are whose and what computing costs."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from expertmesh.errors import ConfigError
from expertmesh.kv_store.tier.manager import KVStoreTier
from expertmesh.kv_store.tier.prompt_timer import PromptTimer

_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")


def refuse_unsafe(config: VllmConfig) -> None:
    """Raises ConfigError for an engine to which blocks from elsewhere would give wrong tokens.

    vLLM switches prefix caching off where an attention kernel can't begin in the middle of a prompt, as for MLA on a
    CPU without AMX, but would still take a connector's hits.
    """
    if config.cache_config.enable_prefix_caching:
        return
    why = (
        "vLLM has no prefix caching for MLA on this CPU (it needs AMX)"
        if config.model_config.use_mla
        else "prefix caching is off"
    )
    raise ConfigError(f"kv_store.url: {why}, and blocks from a store would give wrong tokens; allowed: off")


class KVStoreConnector(OffloadingConnector):
    """OffloadingConnector over a KVStoreTier."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Raises ConfigError where the store would be wrong or can't work."""
        refuse_unsafe(vllm_config)
        assert vllm_config.kv_transfer_config is not None
        (tier_config,) = vllm_config.kv_transfer_config.kv_connector_extra_config["secondary_tiers"]
        tier_config["model"] = model_digest(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._timer = PromptTimer()
        self._tier: KVStoreTier | None = None
        if self.connector_scheduler is not None:
            manager = self.connector_scheduler.manager
            assert isinstance(manager, TieringOffloadingManager)
            (tier,) = manager.secondary_tiers
            assert isinstance(tier, KVStoreTier)
            self._tier = tier

    def on_new_request(self, request: Request) -> None:
        """The request's `cache_salt` is its tenant: vLLM's own prefix cache is divided by it as well."""
        assert self._tier is not None
        self._tier.admit(request.request_id, request.cache_salt or "")
        super().on_new_request(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Called at the end of scheduling a step."""
        metadata = super().build_connector_meta(scheduler_output)
        prompts = {
            new.req_id: len(new.prompt_token_ids or ()) - new.num_computed_tokens
            for new in scheduler_output.scheduled_new_reqs
        }
        self._timer.scheduled(prompts, scheduler_output.num_scheduled_tokens, time.monotonic())
        return metadata

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Called once for each step that was scheduled, when its output is there."""
        if self._tier is not None:
            for tokens, seconds in self._timer.done(time.monotonic()):
                self._tier.computed(tokens, seconds)
        return super().get_kv_connector_stats()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Called before the blocks of a request are freed."""
        self._timer.forget(request.request_id)
        return super().request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """`request_finished` of models with several groups of KV cache."""
        self._timer.forget(request.request_id)
        return super().request_finished_all_groups(request, block_ids)


def model_digest(config: VllmConfig) -> str:
    """16 hex digits of what the engine makes of the checkpoint: its config with overrides, and quantisation."""
    model = config.model_config
    described = {key: value for key, value in model.hf_config.to_dict().items() if key not in _NOT_THE_MODEL}
    text = json.dumps([described, model.quantization, str(model.dtype)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
