"""The experts that a shard holds, as vLLM's own modules.

vLLM builds the whole model with as many experts as the shard has slots, everything on the meta device but the routed
experts (routing.vllm_plugin, role `shard`), and its own `load_weights` maps the tensors. So kernels, activations,
biases, fused layouts and quantised formats are vLLM's, for every model family that it knows, without a table here.

Experts come and go while it serves, a few layers at a time. Where a layer has a slot for what comes, a small model with
just these experts is built beside the serving one, loaded and processed, and its rows are copied over while no batch is
computed. Where it has none, the layer's module is built anew with more slots, the experts that come are loaded into it,
those that stay are copied over, and the two change places.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
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
from expertmesh.platform.checkpoints import Checkpoint, ExpertLayout, Wanted
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
_LAYERS_AT_ONCE = 8
"""Layers that are loaded together: their experts serve while the next ones are read."""

Progress = Callable[[], None]
"""Called when more experts are served than before."""


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

    slots: [layers, slots] expert ids, -1 where a slot is empty, layers as in `layout.layers`. `compute` and `load` may
    run in different threads.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: ExpertLayout, slots: IntArray, dtype: str = "auto", threads: int = 1
    ) -> None:
        """Builds and loads; takes seconds. Raises CheckpointError if a tensor of a leased expert does not arrive."""
        torch.set_num_threads(threads)
        self._checkpoint = checkpoint
        self._layout = layout
        self._dtype = dtype
        self._base = slots.shape[1]
        self._slots = np.full_like(slots, -1)
        self._computing = threading.Lock()
        self._open = ExitStack()
        load_general_plugins()
        if hasattr(current_platform, "import_kernels"):
            current_platform.import_kernels()
        config = self._engine_config(self._base, layout.layers)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.width = int(config.model_config.get_hidden_size())
        self._modules: dict[int, RoutedExperts] = {}
        """By layer number; none where no expert was held yet."""
        self._room = [0] * len(layout.layers)
        """Slots of each layer's module."""
        self._slot_of = {layer: self._lookup(held) for layer, held in zip(layout.layers, self._slots, strict=True)}
        self.load(slots)
        self._open.enter_context(set_forward_context(None, config))

    @property
    def slots(self) -> IntArray:
        """The experts that are served now: [layers, slots] expert ids, -1 where a slot is empty."""
        return self._slots.copy()

    def load(self, wanted: IntArray, progress: Progress | None = None) -> None:
        """Makes `wanted` [layers, slots] what is held, reading just the experts that are new; takes seconds.

        wanted may have more slots than before, or fewer. Computing goes on meanwhile. Experts that go are refused from
        the beginning on; those that come are served as soon as their layers are loaded, a few layers at a time, and
        `progress` is called after each of these. Raises CheckpointError if a tensor does not arrive; what was to go is
        gone then, and of what was to come only whole layers are there.
        """
        layers = self._layout.layers
        width = max(self._slots.shape[1], wanted.shape[1])
        wanted = _padded(wanted, width)
        with self._computing:
            self._slots = _padded(self._slots, width)
            for position, slot in np.argwhere(self._slots != wanted).tolist():
                self._put(position, slot, -1)
        rooms = self._rooms_for(wanted)
        changed = [i for i in range(len(layers)) if (self._slots[i] != wanted[i]).any()]
        filled = [i for i in changed if rooms[i] == self._room[i]]
        for some in _batches(filled):
            self._fill(some, wanted)
            if progress is not None:
                progress()
        for room in sorted(set(rooms)):
            for some in _batches([i for i in range(len(layers)) if rooms[i] == room != self._room[i]]):
                self._rebuild(some, wanted[:, :room])
                if progress is not None:
                    progress()
        with self._computing:
            self._slots = self._slots[:, : max(self._base, *self._room)]

    def _rooms_for(self, wanted: IntArray) -> list[int]:
        """Slots that each layer's module needs for `wanted` [layers, slots]; 0 where none is needed yet.

        Layers that need more than they have get the same number. Those that need no more than the first lease had go
        back to that.
        """
        used = [int(np.flatnonzero(row >= 0).max(initial=-1)) + 1 for row in wanted]
        most = max(used)
        return [
            0 if not need and not has else self._base if need <= self._base else has if need <= has else most
            for need, has in zip(used, self._room, strict=True)
        ]

    def _rebuild(self, positions: Sequence[int], wanted: IntArray) -> None:
        """Gives the layers at `positions` modules with as many slots as `wanted` [layers, room] has, and what it asks
        for in them."""
        room = wanted.shape[1]
        held = self._slots[:, :room]
        layers = {position: self._layout.layers[position] for position in positions}
        fresh = {layers[p]: np.where(wanted[p] == held[p], np.int32(-1), wanted[p]).tolist() for p in positions}
        built = self._build(self._engine_config(room, tuple(fresh)), fresh)
        for position, layer in layers.items():
            stay = np.flatnonzero(held[position] >= 0).tolist()
            if stay:
                _copy_experts(self._modules[layer], stay, built[layer], stay)
            with self._computing:
                self._modules[layer] = built[layer]
                self._room[position] = room
                for slot, expert in enumerate(fresh[layer]):
                    if expert >= 0:
                        self._put(position, slot, expert)

    def _fill(self, positions: Sequence[int], wanted: IntArray) -> None:
        """Loads what `wanted` [layers, slots] asks for into empty slots of the modules at `positions`."""
        layers = self._layout.layers
        fresh = {p: np.flatnonzero((wanted[p] >= 0) & (wanted[p] != self._slots[p])).tolist() for p in positions}
        width = max(map(len, fresh.values()))
        staged_slots = {
            layers[p]: [int(wanted[p, slot]) for slot in slots] + [-1] * (width - len(slots))
            for p, slots in fresh.items()
        }
        staged = self._build(self._engine_config(width, tuple(staged_slots)), staged_slots)
        for position, slots in fresh.items():
            layer = layers[position]
            for row, slot in enumerate(slots):
                with self._computing:  # one expert at a time: no batch waits for more
                    _copy_experts(staged[layer], [row], self._modules[layer], [slot])
                    self._put(position, slot, int(wanted[position, slot]))

    def _put(self, layer: int, slot: int, expert: int) -> None:
        self._slots[layer, slot] = expert
        self._slot_of[self._layout.layers[layer]] = self._lookup(self._slots[layer])

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """y [R, H]: for each row the weighted sum over the pairs that name it. Raises NotHeld, naming the experts."""
        with self._computing:
            return self._compute(layer, body)

    def _compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
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

    def _engine_config(self, slots: int, layers: tuple[int, ...]) -> VllmConfig:
        """For `slots` slots in each of `layers`; the experts of other layers stay on the meta device."""
        arguments = EngineArgs(
            model=str(self._checkpoint.folder),
            skip_tokenizer_init=True,
            dtype=self._dtype,  # type: ignore[arg-type]  # one of ours, checked by the config
            enforce_eager=True,
            max_model_len=128,
            hf_overrides=_for_slots(slots),
            additional_config=MeshSettings(Role.SHARD, layers=layers).to_additional_config(),
        )
        return arguments.create_engine_config()

    def _build(self, config: VllmConfig, slots: Mapping[int, Sequence[int]]) -> dict[int, RoutedExperts]:
        """Modules with the experts of `slots` (layer -> expert id in each slot, -1 for none), loaded and processed."""
        with set_current_vllm_config(config):
            _init_single_process()
            with set_default_torch_dtype(cast("torch.dtype", config.model_config.dtype)), torch.device("meta"):
                model = initialize_model(vllm_config=config, model_config=config.model_config)
            found = {layer_number(m.layer_name): m for m in model.modules() if isinstance(m, RoutedExperts)}
            modules = {layer: found[layer] for layer in slots if layer in found}
            if missing := set(slots) - set(modules):
                raise CheckpointError(
                    f"vLLM builds no routed experts in layers {sorted(missing)} of {self._checkpoint.folder}"
                )
            loaded = set(model.load_weights(self._weights(slots)) or ())
            used = {module for layer, module in modules.items() if max(slots[layer]) >= 0}
            held = {f"{name}." for name, module in model.named_modules() if module in used}
            wanted = {name for name, _ in model.named_parameters() if any(name.startswith(prefix) for prefix in held)}
            if lacking := wanted - loaded:
                raise CheckpointError(f"{self._checkpoint.folder} has no tensor for {sorted(lacking)[0]}")
            for module in modules.values():
                module.quant_method.process_weights_after_loading(module)
                module._ensure_moe_quant_config_init()
        return modules

    def _weights(self, slots: Mapping[int, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the experts in `slots`, named as if slot numbers were expert ids."""
        names: list[str] = []
        wanted: list[Wanted] = []
        for layer, held in slots.items():
            if self._layout.fused:
                rows = [expert if expert >= 0 else None for expert in held]
                fused = self._layout.names(layer, 0) if any(row is not None for row in rows) else ()
                names += fused
                wanted += (Wanted(name, rows) for name in fused)
                continue
            for slot, expert in enumerate(held):
                for name in self._layout.names(layer, expert) if expert >= 0 else ():
                    names.append(_EXPERT_PART.sub(rf"\g<1>{slot}", name))
                    wanted.append(Wanted(name))
        return zip(names, self._checkpoint.read_each(wanted), strict=True)

    def _lookup(self, held: IntArray) -> torch.Tensor:
        """[experts] int64: slot of each expert in `held` [slots], -1 where it is not."""
        row = torch.full((self._layout.num_experts,), -1, dtype=torch.int64)
        for slot, expert in enumerate(held.tolist()):
            if expert >= 0:
                row[expert] = slot
        return row


def _batches(positions: Sequence[int]) -> list[Sequence[int]]:
    return [positions[at : at + _LAYERS_AT_ONCE] for at in range(0, len(positions), _LAYERS_AT_ONCE)]


def _padded(slots: IntArray, width: int) -> IntArray:
    """[layers, width] of [layers, slots]: with empty slots added where there are fewer."""
    return np.pad(slots, ((0, 0), (0, max(0, width - slots.shape[1]))), constant_values=-1)


def _copy_experts(source: RoutedExperts, rows: Sequence[int], target: RoutedExperts, slots: Sequence[int]) -> None:
    """Copies experts, from `rows` into `slots`, in every processed tensor. Raises CheckpointError for a tensor that has
    no such part."""
    tensors = dict(target.named_parameters()) | dict(target.named_buffers())
    for name, fresh in [*source.named_parameters(), *source.named_buffers()]:
        held = tensors[name]
        if not fresh.ndim or held.shape[1:] != fresh.shape[1:] or max(slots) >= len(held) or max(rows) >= len(fresh):
            raise CheckpointError(
                f"{target.layer_name}: {name} of shape {tuple(held.shape)} has no part for one expert; "
                "this format can't be re-placed while it serves (routing.rebalance.enabled: false)"
            )
        for row, slot in zip(rows, slots, strict=True):
            held.data[slot].copy_(fresh.data[row])


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
