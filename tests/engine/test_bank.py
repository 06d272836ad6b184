"""The shard's kernel, vLLM's own modules with a lease's weights, against plain torch arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bare import Worker
from expertmesh.platform.checkpoints import expert_layout, open_checkpoint
from tests.engine.bank_host import BankHost
from tests.engine.reference import combined

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "mixtral"])
def test_a_bank_computes_its_lease_and_nothing_else(family: Callable[[str], Path], name: str) -> None:
    folder = family(name)
    checkpoint = open_checkpoint(folder)
    layout = expert_layout(checkpoint)
    hidden = int(checkpoint.config["hidden_size"])
    # Slots in no order, one of them empty, different ones in each layer.
    slots = np.array([[(5 + i) % layout.num_experts, -1, (2 * i) % 3, 3] for i in range(len(layout.layers))], np.int32)
    with Worker(BankHost, folder, slots) as host:
        width, dtype, read = host.ask("facts")
        assert (width, dtype) == (hidden, "float32")
        leased = [(layer, e) for layer, held in zip(layout.layers, slots.tolist(), strict=True) for e in held if e >= 0]
        wanted = sum(layout.expert_bytes(layer, expert) for layer, expert in leased)
        assert read == wanted
        generator = torch.Generator().manual_seed(3)
        for i, layer in enumerate(layout.layers):
            held = torch.tensor([e for e in slots[i].tolist() if e >= 0], dtype=torch.int32)
            x = torch.randn(6, hidden, generator=generator)
            uneven = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 5], dtype=torch.int32)
            even = torch.arange(6, dtype=torch.int32).repeat_interleave(2)
            for rows in (uneven, even):
                experts = held[torch.arange(len(rows)) % 3]
                weights = torch.rand(len(rows), generator=generator)
                y = host.ask("compute", layer, (x, experts, rows, weights))
                reference = combined(folder, layer, x, experts, rows, weights)
                torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))
                assert torch.equal(y[3], torch.zeros(hidden)) == (rows is uneven)
        missing = next(e for e in range(layout.num_experts) if e not in slots[0])
        pair = (torch.randn(1, hidden), torch.tensor([missing], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        with pytest.raises(RuntimeError, match=rf"NotHeld: experts \[{missing}\] of layer {layout.layers[0]}"):
            host.ask("compute", layout.layers[0], (*pair, torch.ones(1)))
        with pytest.raises(RuntimeError, match="NotHeld: layer 99"):
            host.ask("compute", 99, (*pair, torch.ones(1)))


def check_serves(host: Worker, folder: Path, held: Mapping[int, list[int]]) -> None:
    """Of the first four experts: those that each layer holds are computed right, the others refused."""
    hidden = int(open_checkpoint(folder).config["hidden_size"])
    x = torch.randn(4, hidden, generator=torch.Generator().manual_seed(5))
    rows, weights = torch.arange(4, dtype=torch.int32), torch.full((4,), 0.5)
    for layer, mine in held.items():
        for expert in range(4):
            experts = torch.full((4,), expert, dtype=torch.int32)
            if expert not in mine:
                with pytest.raises(RuntimeError, match="NotHeld"):
                    host.ask("compute", layer, (x, experts, rows, weights))
                continue
            y = host.ask("compute", layer, (x, experts, rows, weights))
            reference = combined(folder, layer, x, experts, rows, weights)
            torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_come_and_go_while_it_serves(family: Callable[[str], Path], name: str) -> None:
    folder = family(name)
    layout = expert_layout(open_checkpoint(folder))
    slots = np.array([[0, 1, -1]] * len(layout.layers), np.int32)
    wanted = slots.copy()
    wanted[0] = [0, 3, 2]  # one replaced, one into the empty slot
    wanted[-1] = [2, -1, -1]  # one replaced, one dropped
    with Worker(BankHost, folder, slots) as host:
        read = host.ask("load", wanted)
        first, last = layout.layers[0], layout.layers[-1]
        assert read == layout.expert_bytes(first, 3) + layout.expert_bytes(first, 2) + layout.expert_bytes(last, 2)
        check_serves(host, folder, dict(zip(layout.layers, wanted.tolist(), strict=True)))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_bank_grows_for_more_experts_and_shrinks_when_they_are_gone(family: Callable[[str], Path], name: str) -> None:
    folder = family(name)
    layout = expert_layout(open_checkpoint(folder))
    layers = len(layout.layers)
    empty = np.full((layers, 2), -1, np.int32)
    few = np.array([[1, -1]] * layers, np.int32)
    many = np.array([[1, -1, 3, 2]] * layers, np.int32)
    many[0, 1:] = [0, -1, -1]  # no more slots here, and one that was free
    with Worker(BankHost, folder, empty) as host:
        assert host.ask("facts")[2] == 0, "nothing is read before it is asked for"
        for wanted, read in ((few, layers), (many, 2 * layers - 1), (few, 0)):
            fresh = host.ask("load", np.pad(wanted, ((0, 0), (0, 2)), constant_values=-1))
            assert fresh == read * layout.expert_bytes(layout.layers[0], 0)
            check_serves(host, folder, dict(zip(layout.layers, wanted.tolist(), strict=True)))
