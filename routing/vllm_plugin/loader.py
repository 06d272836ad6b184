"""The load format of attention replicas: everything of the checkpoint but the routed experts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import is_expert_tensor
from expertmesh.routing.vllm_plugin.layer import MeshExperts
from expertmesh.routing.vllm_plugin.settings import LOAD_FORMAT, MeshSettings

REPORT_NAME = "loaded.json"
"""File in the mailbox that tells what was read: `{"bytes_read", "tensors_read", "tensors_skipped", "seconds"}`."""


class AttentionLoader(DefaultModelLoader):
    """vLLM's loader for safetensors that leaves out tensors by name, before a byte of them is read."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))
        self._read_bytes = self._read = self._skipped = 0

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        _, files, _, _ = self._prepare_weights(
            source.model_or_path, source.subfolder, source.revision, False, source.allow_patterns_overrides
        )
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        for file in sorted(files):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if is_expert_tensor(name):
                        self._skipped += 1
                        continue
                    tensor = tensors.get_tensor(name)
                    self._read_bytes += tensor.nbytes
                    self._read += 1
                    yield source.prefix + name, tensor

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The model, its routed experts remote.

        Raises CheckpointError if a module of routed experts stayed local: it would run on memory that nobody filled.
        """
        begin = time.perf_counter()
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        settings = MeshSettings.of(vllm_config.additional_config)
        check_remote(model, settings)
        if settings is not None:
            report = {
                "bytes_read": self._read_bytes,
                "tensors_read": self._read,
                "tensors_skipped": self._skipped,
                "seconds": round(time.perf_counter() - begin, 3),
            }
            (Path(settings.mailbox) / REPORT_NAME).write_text(json.dumps(report))
        return model


def check_remote(model: nn.Module, settings: MeshSettings | None) -> None:
    """Raises CheckpointError unless the model's routed experts are remote in just the layers that the mesh serves."""
    remote: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            continue
        if not isinstance(module, MeshExperts) or not module.is_remote:
            raise CheckpointError(f"{name} ({type(module).__name__}) stayed local in an attention replica")
        remote.add(module.mesh_layer)
    expected = set(settings.layers) if settings is not None else set()
    if remote != expected or not remote:
        raise CheckpointError(
            f"the engine has remote experts in layers {sorted(remote)}, the checkpoint in {sorted(expected)}"
        )


@cache
def register_loader() -> None:
    """Makes the load format known to vLLM, once a process."""
    register_model_loader(LOAD_FORMAT)(AttentionLoader)
