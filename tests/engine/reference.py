"""A plain torch reference of routed experts, straight from a checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from expertmesh.platform.checkpoints import open_checkpoint


def expert_output(folder: Path, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What one expert makes of x [R, H] -> [R, H], by the formulas of the families that the tests use.

    GPT-OSS: gate and up interleaved, clamped at 7, (up + 1) * gate * sigmoid(1.702 * gate), with biases; the others:
    down(silu(gate(x)) * up(x)).
    """
    checkpoint = open_checkpoint(folder)
    if "gpt_oss" in checkpoint.config["model_type"]:
        stem = f"model.layers.{layer}.mlp.experts."
        both = x @ checkpoint.read(f"{stem}gate_up_proj")[expert] + checkpoint.read(f"{stem}gate_up_proj_bias")[expert]
        gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ checkpoint.read(f"{stem}down_proj")[expert] + checkpoint.read(f"{stem}down_proj_bias")[expert]
    stem, names = {
        "mixtral": (f"model.layers.{layer}.block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2")),
    }.get(
        checkpoint.config["model_type"],
        (f"model.layers.{layer}.mlp.experts.{expert}.", ("gate_proj", "up_proj", "down_proj")),
    )
    gate, up, down = (checkpoint.read(f"{stem}{name}.weight") for name in names)
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def combined(
    folder: Path, layer: int, x: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """y [R, H]: y[r] = sum over pairs p with rows[p] = r of weights[p] * expert(experts[p], x[r])."""
    y = torch.zeros_like(x)
    for expert, row, weight in zip(experts.tolist(), rows.tolist(), weights.tolist(), strict=True):
        y[row] += weight * expert_output(folder, layer, expert, x[row : row + 1])[0]
    return y
