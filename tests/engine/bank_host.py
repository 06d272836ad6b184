"""An ExpertBank in a process of its own, where vLLM may set up what it likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.bare import engine_environment
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.wire.frame import DispatchBody

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class BankHost:
    """To be run by a benchmarks.bare.Worker."""

    def __init__(self, folder: Path, slots: IntArray) -> None:
        engine_environment(1)
        from expertmesh.deployments.experts.bank import ExpertBank
        from expertmesh.platform.checkpoints import expert_layout, open_checkpoint

        self._checkpoint = open_checkpoint(folder)
        self._bank = ExpertBank(self._checkpoint, expert_layout(self._checkpoint), slots, "float32")

    def facts(self) -> tuple[int, str, int]:
        """Width, dtype, tensor bytes read."""
        return self._bank.width, self._bank.dtype, self._checkpoint.bytes_read

    def compute(self, layer: int, body: Tensors) -> torch.Tensor:
        """y [R, H] for x [R, H], experts, rows, weights [P]."""
        with torch.inference_mode():
            return self._bank.compute(layer, DispatchBody(*body)).clone()

    def load(self, wanted: IntArray) -> int:
        """Makes these slots what is held, empty ones at the end left out; the tensor bytes that were read for it."""
        before = self._checkpoint.bytes_read
        self._bank.load(wanted)
        held = self._bank.slots
        assert np.array_equal(held, wanted[:, : held.shape[1]])
        assert (wanted[:, held.shape[1] :] == -1).all()
        return self._checkpoint.bytes_read - before

    def close(self) -> None:
        """Leaves vLLM's context."""
        self._bank.close()
