"""vLLM's routed experts, out of tree: remote in attention replicas, on the real device in expert shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.platforms import current_platform

from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.routing.vllm_plugin.op import open_dispatcher, register_op
from expertmesh.routing.vllm_plugin.settings import MeshSettings, Role


def layer_number(layer_name: str) -> int:
    """The model's layer number in a module's name: its first whole-number part. Raises ConfigError if it has none."""
    for part in layer_name.split("."):
        if part.isdecimal():
            return int(part)
    raise ConfigError(f"module {layer_name!r} has no layer number in its name")


class RemoteMethod(FusedMoEMethodBase):
    """The "quantisation method" of experts without weights: creates none, asks the router to run on this side."""

    is_monolithic = False
    supports_internal_mk = True  # no naive all-to-all of vLLM's around the dispatch
    mk_can_overlap_shared_experts = False
    topk_indices_dtype = torch.int32

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """None: the weights are on the shards."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing was loaded."""

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> tuple[int, int]:
        """The checkpoint's own sizes: padding is the shard's kernel's business."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Unquantised rows go over the wire."""
        return FusedMoEQuantConfig.make()


class MeshExperts(RoutedExperts):
    """Mixed into every class of routed experts. Outside a mesh it behaves as vLLM's own."""

    mesh: MeshSettings | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config_or_none()
        settings = MeshSettings.of(config.additional_config) if config is not None else None
        object.__setattr__(self, "mesh", settings)  # before nn.Module's own __init__
        if settings is not None and settings.role is Role.SHARD:
            layer = layer_number(str(args[0] if args else kwargs["layer_name"]))
            with torch.device(current_platform.device_type if layer in settings.layers else "meta"):
                super().__init__(*args, **kwargs)
            return
        super().__init__(*args, **kwargs)
        self.mesh_layer = layer_number(self.layer_name)
        if settings is not None:
            self._check(settings)
            open_dispatcher(settings)

    @property
    def is_remote(self) -> bool:
        """Whether the experts are computed by shards."""
        return self.mesh is not None and self.mesh.role is Role.ATTENTION

    def _check(self, settings: MeshSettings) -> None:
        parallel = self.moe_config.moe_parallel_config
        if self.moe_config.tp_size > 1 or parallel.enable_eplb:
            raise ConfigError(f"{self.layer_name}: tensor parallelism and EPLB are not supported with remote experts")
        if self.mesh_layer not in settings.layers or self.global_num_experts != settings.num_experts:
            raise CheckpointError(
                f"{self.layer_name}: the engine has {self.global_num_experts} experts here, "
                f"the mesh {settings.num_experts} in layers {settings.layers}"
            )

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: FusedMoEConfig) -> FusedMoEMethodBase:
        if self.is_remote:
            return RemoteMethod(moe_config)
        return super()._get_quant_method(prefix, quant_config, moe_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """As vLLM's; a remote layer refuses every tensor, since reading one is a bug of the load format."""
        if not self.is_remote:
            yield from super().load_weights(weights)
            return
        for name, _ in weights:
            raise CheckpointError(f"{self.layer_name}: expert tensor {name} was read by an attention replica")

    def forward_modular(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> Any:
        """Weighted sum over each token's experts: x [T, H], topk_weights and topk_ids [T, k] -> [T, H]."""
        if not self.is_remote:
            return super().forward_modular(x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        if self.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return torch.ops.vllm.expertmesh_dispatch(x, topk_weights, topk_ids, self.mesh_layer)


def _extend(base: type[RoutedExperts]) -> None:
    """Registers a mesh-aware twin of a class of routed experts, found by vLLM under the class's name."""
    if issubclass(base, MeshExperts) or base.__name__ in op_registry_oot:
        return
    twin = MeshExperts if base is RoutedExperts else type(f"Mesh{base.__name__}", (MeshExperts, base), {})
    base.register_oot(twin)


def register_layers() -> None:
    """Registers twins of RoutedExperts and its subclasses, those that models bring later included.

    vLLM looks a replacement up by the exact class name and names no hook for classes that it does not know yet, so
    `__init_subclass__`, Python's own, is that hook.
    """
    register_op()
    if "RoutedExperts" in op_registry_oot:
        return

    def on_subclass(cls: type[RoutedExperts], /, **kwargs: Any) -> None:
        super(RoutedExperts, cls).__init_subclass__(**kwargs)
        _extend(cls)

    _extend(RoutedExperts)
    for known in RoutedExperts.__subclasses__():
        _extend(known)
    RoutedExperts.__init_subclass__ = classmethod(on_subclass)  # type: ignore[assignment]
