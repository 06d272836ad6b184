"""Hugging Face checkpoints: what a folder or its mirror holds, its routed experts, and tensors by byte range.

Importing this does not import torch; only reading tensors does.
"""

from __future__ import annotations

from expertmesh.platform.checkpoints.check import check_checkpoint
from expertmesh.platform.checkpoints.checkpoint import Checkpoint, Wanted, checkpoint_revision, open_checkpoint
from expertmesh.platform.checkpoints.expert_layout import ExpertLayout, expert_layout, is_expert_tensor
from expertmesh.platform.checkpoints.safetensors_header import TensorInfo

__all__ = [
    "Checkpoint",
    "ExpertLayout",
    "TensorInfo",
    "Wanted",
    "check_checkpoint",
    "checkpoint_revision",
    "expert_layout",
    "is_expert_tensor",
    "open_checkpoint",
]
