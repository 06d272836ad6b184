"""The load format of attention replicas: everything of the checkpoint but the routed experts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import Wanted, is_expert_tensor, open_checkpoint
from expertmesh.routing.vllm_plugin.layer import MeshExperts
from expertmesh.routing.vllm_plugin.settings import LOAD_FORMAT, MeshSettings

REPORT_NAME = "loaded.json"
"""File in the mailbox that tells what was read: `{"bytes_read", "bytes_fetched", "tensors_read", "tensors_skipped",
"seconds", "waited_s"}`, of which `bytes_fetched` came over the network, and `waited_s` went by waiting for tensors."""


class AttentionLoader(DefaultModelLoader):
    """vLLM's loader with the checkpoint's tensors from a disk or from S3, and without those of routed experts."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))
        self._report = {"bytes_read": 0, "bytes_fetched": 0, "tensors_read": 0, "tensors_skipped": 0, "waited_s": 0.0}

    def _get_weights_iterator(
        self, source: DefaultModelLoader.Source
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        self.counter_before_loading_weights = self.counter_before_loading_weights or time.perf_counter()
        checkpoint = open_checkpoint(Path(source.model_or_path) / (source.subfolder or ""))
        places = sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file.name, item[1].offset))
        names = [name for name, _ in places if not is_expert_tensor(name)]
        try:
            yield from zip(
                (source.prefix + name for name in names), checkpoint.read_each(map(Wanted, names)), strict=True
            )
        finally:
            self._report["tensors_read"] += len(names)
            self._report["tensors_skipped"] += len(places) - len(names)
            for counter in ("bytes_read", "bytes_fetched", "waited_s"):
                self._report[counter] += getattr(checkpoint, counter)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The model, its routed experts remote.

        Raises CheckpointError if a module of routed experts stayed local: it would run on memory that nobody filled.
        """
        begin = time.perf_counter()
        model: nn.Module = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        settings = MeshSettings.of(vllm_config.additional_config)
        check_remote(model, settings)
        if settings is not None:
            report = {**self._report, "seconds": round(time.perf_counter() - begin, 3)}
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
