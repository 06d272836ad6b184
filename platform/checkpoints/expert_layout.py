"""Which tensors of a checkpoint are routed experts, by layer and expert.

Two ways of naming are in use:

* separate: `model.layers.3.mlp.experts.7.down_proj.weight`, one tensor per expert;
* fused: `model.layers.3.mlp.experts.down_proj`, one tensor per layer with the expert as dimension 0.

A *kind* is what is left of a name without layer and expert: (`model.layers.`, `.mlp.experts.`, `down_proj.weight`).
In a sound layer every expert has the same kinds, with the same shape and dtype. Layers may differ (mixed precision).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.checkpoint import Checkpoint
from expertmesh.platform.checkpoints.safetensors_header import TensorInfo

EXPERT_COUNT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""The names under which config.json gives the number of routed experts of a layer."""

_EXPERT = re.compile(r"(^|\.)experts\.")
_NUMBER = "0|[1-9][0-9]{0,8}"  # not "07" beside "7", and nothing that int() would choke on
_EXPERT_NAME = re.compile(
    rf"(?P<stem>(?:|.*?\.)layers\.)(?P<layer>{_NUMBER})(?P<path>\.(?:.*?\.)?experts\.)"
    rf"(?:(?P<expert>{_NUMBER})\.)?(?P<rest>.+)"
)
_Kind = tuple[str, str, str]


def is_expert_tensor(name: str) -> bool:
    """Whether `name` is a tensor of routed experts; shared experts, gates and routers are not."""
    return _EXPERT.search(name) is not None


@dataclass(frozen=True)
class ExpertLayout:
    """Where the routed experts are.

    `layers` are the numbers of the layers that have any, ascending, without layers at or beyond
    `num_hidden_layers` (multi-token prediction heads, which the engine doesn't load). `num_experts` is per layer.
    A dense checkpoint has no layers, 0 experts and is not fused.
    """

    layers: tuple[int, ...]
    num_experts: int
    fused: bool
    _names: Mapping[tuple[int, int], tuple[str, ...]] = field(repr=False)
    _bytes: Mapping[int, int] = field(repr=False)

    def names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names, ascending, of the tensors that hold this expert; if fused, those of the whole layer.

        CheckpointError if there is no such layer or expert.
        """
        self._check(layer, expert)
        return self._names[layer, -1 if self.fused else expert]

    def expert_bytes(self, layer: int, expert: int) -> int:
        """Bytes of this one expert, also when it is a row of fused tensors; CheckpointError as for `names`."""
        self._check(layer, expert)
        return self._bytes[layer]

    def is_expert(self, name: str) -> bool:
        """The same as `is_expert_tensor`."""
        return is_expert_tensor(name)

    @property
    def total_expert_bytes(self) -> int:
        """Bytes of all experts of all `layers`."""
        return sum(self._bytes.values()) * self.num_experts

    def _check(self, layer: int, expert: int) -> None:
        if layer not in self._bytes:
            raise CheckpointError(f"layer {layer} has no routed experts; the layers {list(self.layers)} do")
        if not 0 <= expert < self.num_experts:
            raise CheckpointError(f"layer {layer} has no expert {expert}, allowed: 0..{self.num_experts - 1}")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model: `text_config` of a multimodal one, else all."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def expert_layout(checkpoint: Checkpoint) -> ExpertLayout:
    """Find and check the routed experts of `checkpoint`.

    CheckpointError, naming layer, expert and tensor, if the experts are not those that config.json promises: one is
    missing or lacks a tensor that its siblings have, two differ in shape or dtype, a layer has a router and no
    experts, dimension 0 of a fused tensor is not the number of experts, or a name fits neither way of naming.
    """
    promised = _promised_experts(checkpoint)
    found = _found_experts(checkpoint)
    if not found:
        if promised:
            raise CheckpointError(f"{checkpoint.folder}: config.json names {promised} experts, no tensor holds any")
        return ExpertLayout((), 0, False, {}, {})
    if not promised:
        raise CheckpointError(
            f"{checkpoint.folder}: holds routed experts (layer {min(found)}), but config.json names no number of "
            f"them; it must be one of {', '.join(EXPERT_COUNT_KEYS)}"
        )
    fused = _is_fused(checkpoint, found)
    names: dict[tuple[int, int], tuple[str, ...]] = {}
    sizes: dict[int, int] = {}
    for layer, members in sorted(found.items()):
        if fused:
            sizes[layer] = _check_fused(checkpoint, layer, members[-1], promised)
            names[layer, -1] = tuple(sorted(members[-1].values()))
        else:
            sizes[layer] = _check_separate(checkpoint, layer, members, promised)
            names.update({(layer, expert): tuple(sorted(kinds.values())) for expert, kinds in members.items()})
    _check_layers(checkpoint, found)
    _check_routers(checkpoint, found)
    return ExpertLayout(tuple(sorted(found)), promised, fused, names, sizes)


def _promised_experts(checkpoint: Checkpoint) -> int:
    """Experts per layer according to config.json, 0 if it names none."""
    counts: dict[str, int] = {}
    for where, config in (("", checkpoint.config), ("text_config.", text_config(checkpoint.config))):
        for key in EXPERT_COUNT_KEYS:
            value = config.get(key)
            if value is None:
                continue
            if type(value) is not int or value < 0:
                raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {where}{key} must be an integer >= 0")
            counts[where + key] = value
    if len(set(counts.values())) > 1:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: different numbers of experts: {counts}")
    return max(counts.values(), default=0)


def _found_experts(checkpoint: Checkpoint) -> dict[int, dict[int, dict[_Kind, str]]]:
    """layer -> expert (-1 in fused tensors) -> kind -> name."""
    found: dict[int, dict[int, dict[_Kind, str]]] = defaultdict(lambda: defaultdict(dict))
    depth = text_config(checkpoint.config).get("num_hidden_layers")
    for name in filter(is_expert_tensor, checkpoint.tensors):
        match = _EXPERT_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: tensor {name!r} is an expert's but not named "
                "'...layers.L....experts.N.*' or '...layers.L....experts.*'"
            )
        layer = int(match["layer"])
        if not isinstance(depth, int) or layer < depth:
            kind = (match["stem"], match["path"], match["rest"])
            found[layer][int(match["expert"] or -1)][kind] = name
    return found


def _is_fused(checkpoint: Checkpoint, found: dict[int, dict[int, dict[_Kind, str]]]) -> bool:
    fused = [layer for layer, members in found.items() if -1 in members]
    separate = [layer for layer, members in found.items() if members.keys() - {-1}]
    if fused and separate:
        raise CheckpointError(
            f"{checkpoint.folder}: experts are fused in layer {fused[0]} and separate in layer {separate[0]}; "
            "all must be named in the same way"
        )
    return bool(fused)


def _check_fused(checkpoint: Checkpoint, layer: int, kinds: dict[_Kind, str], promised: int) -> int:
    """Check one layer; bytes of one of its experts."""
    for name in kinds.values():
        info = checkpoint.tensors[name]
        if info.shape[:1] != (promised,):
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}; its first dimension must be the "
                f"{promised} experts that config.json names"
            )
    return sum(checkpoint.tensors[name].nbytes for name in kinds.values()) // promised


def _check_separate(checkpoint: Checkpoint, layer: int, members: dict[int, dict[_Kind, str]], promised: int) -> int:
    """Check one layer; bytes of one of its experts."""
    where = f"{checkpoint.folder}: layer {layer}"
    if missing := sorted(set(range(promised)) - members.keys()):
        raise CheckpointError(f"{where} lacks expert {missing[0]} of the {promised} that config.json names")
    if surplus := sorted(members.keys() - set(range(promised))):
        raise CheckpointError(f"{where} has an expert {surplus[0]}, config.json names {promised} experts")
    kinds = {kind: name for expert in sorted(members, reverse=True) for kind, name in members[expert].items()}
    for expert in range(promised):
        for kind, sibling in kinds.items():
            name = members[expert].get(kind)
            if name is None:
                lacking = f"{kind[0]}{layer}{kind[1]}{expert}.{kind[2]}"
                raise CheckpointError(f"{where}: expert {expert} lacks the tensor {lacking!r}, {sibling!r} exists")
            _check_alike(checkpoint.tensors[name], name, checkpoint.tensors[sibling], sibling)
    return sum(checkpoint.tensors[name].nbytes for name in members[0].values())


def _check_alike(info: TensorInfo, name: str, expected: TensorInfo, sibling: str) -> None:
    if (info.dtype, info.shape) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, but its sibling {sibling!r} is "
            f"{expected.dtype} {list(expected.shape)}"
        )


def _check_layers(checkpoint: Checkpoint, found: dict[int, dict[int, dict[_Kind, str]]]) -> None:
    """All experts of a layer, or its fused tensors, may lack one kind: only other layers tell."""
    if "quantization_config" in checkpoint.config:
        return  # layers that were left out of the quantisation have fewer kinds, rightly
    kinds = {layer: {kind for member in members.values() for kind in member} for layer, members in found.items()}
    sample = {kind: layer for layer, members in kinds.items() for kind in members}
    for layer, members in sorted(kinds.items()):
        for stem, path, rest in sorted(sample.keys() - members):
            raise CheckpointError(
                f"{checkpoint.folder}: layer {layer} lacks the expert tensor '{stem}{layer}{path}*{rest}', "
                f"layer {sample[stem, path, rest]} has it"
            )


def _check_routers(checkpoint: Checkpoint, found: dict[int, dict[int, dict[_Kind, str]]]) -> None:
    """A router where no experts are: a whole layer of experts got lost, which no sibling can tell."""
    places = {kind[:2] for members in found.values() for kinds in members.values() for kind in kinds}
    for stem, path in places:
        block = path.removesuffix("experts.")
        router = re.compile(rf"{re.escape(stem)}({_NUMBER}){re.escape(block)}(gate|router)\.(.+\.)?weight")
        for match in filter(None, map(router.fullmatch, checkpoint.tensors)):
            layer, depth = int(match[1]), text_config(checkpoint.config).get("num_hidden_layers")
            if layer not in found and (not isinstance(depth, int) or layer < depth):
                raise CheckpointError(
                    f"{checkpoint.folder}: layer {layer} has the router {match[0]!r} but no tensor of an expert"
                )
