"""The experts that a shard holds, as vLLM's own modules.

vLLM builds the whole model with as many experts as the shard has slots, everything on the meta device but the routed
experts (routing.vllm_plugin, role `shard`), and its own `load_weights` maps the tensors. So kernels, activations,
biases, fused layouts and quantised formats are vLLM's, for every model family that it knows, without a table here.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.torch_utils import set_default_torch_dtype

from expertmesh.deployments.experts.server import NotHeld
from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints import Checkpoint, ExpertLayout
from expertmesh.platform.checkpoints.expert_layout import EXPERT_COUNT_KEYS
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.vllm_plugin import MeshSettings, Role
from expertmesh.routing.vllm_plugin.layer import layer_number
from expertmesh.routing.wire.frame import DispatchBody

log = logging.getLogger("expertmesh.experts")

_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
_GROUP_KEYS = ("n_group", "topk_group", "num_expert_group")
_EXPERT_PART = re.compile(r"((?:^|\.)experts\.)\d+(?=\.)")


def _for_slots(slots: int) -> Callable[[Any], Any]:
    """An edit of the model's config: `slots` experts, one a token, no groups of experts."""

    def edit(config: Any) -> Any:
        text = config.get_text_config()
        for part in {id(config): config, id(text): text}.values():
            for keys, value in ((EXPERT_COUNT_KEYS, slots), (_TOP_K_KEYS, 1), (_GROUP_KEYS, 1)):
                for key in keys:
                    if getattr(part, key, None) is not None:
                        setattr(part, key, value)
        return config

    return edit


class ExpertBank:
    """The kernel of a shard: `compute` for the experts in its slots.

    slots: [layers, slots] expert ids, -1 where a slot is empty, layers as in `layout.layers`.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: ExpertLayout, slots: IntArray, dtype: str = "auto", threads: int = 1
    ) -> None:
        """Builds and loads; takes seconds. Raises CheckpointError if a tensor of a leased expert does not arrive."""
        torch.set_num_threads(threads)
        self._checkpoint = checkpoint
        self._layout = layout
        self._open = ExitStack()
        load_general_plugins()
        if hasattr(current_platform, "import_kernels"):
            current_platform.import_kernels()
        config = self._engine_config(slots.shape[1], dtype)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.width = int(config.model_config.get_hidden_size())
        modules = self._build(config, slots)
        self._modules = {layer: modules[layer] for layer in layout.layers}
        self._slot_of = self._lookup(slots)
        self._open.enter_context(set_forward_context(None, config))

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """y [R, H]: for each row the weighted sum over the pairs that name it. Raises NotHeld, naming the experts."""
        lookup = self._slot_of.get(layer)
        if lookup is None:
            raise NotHeld(f"layer {layer} has no routed experts")
        experts = body.experts.long()
        if int(experts.min()) < 0 or int(experts.max()) >= len(lookup):
            raise NotHeld(f"layer {layer} has experts 0 to {len(lookup) - 1}; the frame names others")
        slot = lookup[experts]
        if int(slot.min()) < 0:
            missing = sorted(set(experts[slot < 0].tolist()))
            raise NotHeld(f"experts {missing} of layer {layer} are not in this shard's slots")
        forward = cast("Forward", self._modules[layer].forward_modular)
        return run_pairs(forward, body.x, body.rows, slot, body.weights)

    def close(self) -> None:
        """Leaves vLLM's forward context; the weights go with the object."""
        self._open.close()

    def _engine_config(self, slots: int, dtype: str) -> VllmConfig:
        arguments = EngineArgs(
            model=str(self._checkpoint.folder),
            skip_tokenizer_init=True,
            dtype=dtype,  # type: ignore[arg-type]  # one of ours, checked by the config
            enforce_eager=True,
            max_model_len=128,
            hf_overrides=_for_slots(slots),
            additional_config=MeshSettings(Role.SHARD).to_additional_config(),
        )
        return arguments.create_engine_config()

    def _build(self, config: VllmConfig, slots: IntArray) -> dict[int, RoutedExperts]:
        with set_current_vllm_config(config):
            _init_single_process()
            with set_default_torch_dtype(cast("torch.dtype", config.model_config.dtype)), torch.device("meta"):
                model = initialize_model(vllm_config=config, model_config=config.model_config)
            modules = {layer_number(m.layer_name): m for m in model.modules() if isinstance(m, RoutedExperts)}
            if missing := set(self._layout.layers) - set(modules):
                raise CheckpointError(
                    f"vLLM builds no routed experts in layers {sorted(missing)} of {self._checkpoint.folder}"
                )
            loaded = set(model.load_weights(self._weights(slots)) or ())
            held = {f"{name}." for name, m in model.named_modules() if m in set(modules.values())}
            wanted = {name for name, _ in model.named_parameters() if any(name.startswith(prefix) for prefix in held)}
            if lacking := wanted - loaded:
                raise CheckpointError(f"{self._checkpoint.folder} has no tensor for {sorted(lacking)[0]}")
            for module in modules.values():
                module.quant_method.process_weights_after_loading(module)
                module._ensure_moe_quant_config_init()
        return modules

    def _weights(self, slots: IntArray) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the leased experts, named as if slot numbers were expert ids."""
        for layer, held in zip(self._layout.layers, slots.tolist(), strict=True):
            if self._layout.fused:
                rows = [max(expert, 0) for expert in held]  # an empty slot needs a row of the right shape: never used
                for name in self._layout.names(layer, 0):
                    yield name, self._checkpoint.read_rows(name, rows)
                continue
            for slot, expert in enumerate(held):
                for name in self._layout.names(layer, expert) if expert >= 0 else ():
                    yield _EXPERT_PART.sub(rf"\g<1>{slot}", name), self._checkpoint.read(name)

    def _lookup(self, slots: IntArray) -> dict[int, torch.Tensor]:
        """layer -> [experts] int64: slot of each expert, -1 where it is not held."""
        table: dict[int, torch.Tensor] = {}
        for layer, held in zip(self._layout.layers, slots.tolist(), strict=True):
            row = torch.full((self._layout.num_experts,), -1, dtype=torch.int64)
            for slot, expert in enumerate(held):
                if expert >= 0:
                    row[expert] = slot
            table[layer] = row
        return table


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [N, H], weights [N, m], slots [N, m]) -> [N, H], the weighted sum over m."""


def run_pairs(
    forward: Forward, x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """y [R, H]: y[r] = sum over pairs p with rows[p] = r of weights[p] * expert(slots[p], x[r]).

    x: [R, H]; rows, slots, weights: [P]. When every row has the same number of pairs, in order, they go to the kernel
    as they came; otherwise each pair goes as a row of its own and the rows are added up here, in x's dtype.
    """
    r, p = len(x), len(rows)
    per_row = p // r
    if per_row * r == p and torch.equal(
        rows.view(r, per_row), torch.arange(r, dtype=rows.dtype)[:, None].expand(r, per_row)
    ):
        return forward(x, weights.view(r, per_row), slots.view(r, per_row).to(torch.int32))
    y = forward(x[rows.long()], weights[:, None], slots[:, None].to(torch.int32))
    return torch.zeros_like(x).index_add_(0, rows.long(), y)


def _init_single_process() -> None:
    """vLLM's layers ask for process groups, also in a world of one."""
    if torch.distributed.is_initialized():
        return
    with tempfile.TemporaryDirectory(prefix="expertmesh-") as folder:
        init_distributed_environment(1, 0, f"file://{Path(folder) / 'rendezvous'}", 0, current_platform.dist_backend)
        initialize_model_parallel(1, 1)
