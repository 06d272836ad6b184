"""A shard and an engine that load from S3: what they compute, and which bytes they asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bare import EngineHost, Worker, bare_mesh, engine_arguments
from benchmarks.cold_start import bytes_asked_for
from benchmarks.parity import LOGPROB_TOLERANCE, prompts_for, vocabulary_of
from expertmesh.platform.checkpoints import expert_layout, is_expert_tensor, open_checkpoint
from expertmesh.routing.vllm_plugin.loader import REPORT_NAME
from tests.engine.bank_host import BankHost
from tests.engine.reference import combined
from tests.weights.conftest import Pushed
from tests.weights.test_mirror import FILE

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_shard_reads_its_experts_from_s3_and_nothing_else(
    family: Callable[[str], Path], pushed: Callable[[Path], Pushed], tmp_path: Path, name: str
) -> None:
    there = pushed(family(name))
    model = there.mirror(tmp_path)
    layout = expert_layout(open_checkpoint(model))
    there.proxy.reset()
    slots = np.array([[5, -1, i % 3, 3] for i in range(len(layout.layers))], np.int32)
    wanted = slots.copy()
    wanted[0, 1] = 4
    with Worker(BankHost, model, slots) as host:
        width, _, read = host.ask("facts")
        leased = [(layer, e) for layer, held in zip(layout.layers, slots.tolist(), strict=True) for e in held if e >= 0]
        assert read == sum(layout.expert_bytes(layer, expert) for layer, expert in leased)
        assert there.proxy.sent == {there.path(FILE): read}
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(3))
        rows, weights = torch.arange(4, dtype=torch.int32), torch.full((4,), 0.5)
        assert host.ask("load", wanted) == layout.expert_bytes(layout.layers[0], 4)
        for layer, held in zip(layout.layers, wanted.tolist(), strict=True):
            experts = torch.tensor([max(e, 3) for e in held], dtype=torch.int32)
            reference = combined(there.folder, layer, x, experts, rows, weights)
            y = host.ask("compute", layer, (x, experts, rows, weights))
            torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


def test_an_engine_from_s3_says_what_transformers_says_and_asks_for_no_expert(qwen: Pushed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = qwen.mirror(tmp_path)
    checkpoint = open_checkpoint(model)
    prompts = prompts_for(vocabulary_of(model), 3)
    with bare_mesh(qwen.folder, 1) as (mesh, _):
        qwen.proxy.reset()
        arguments = {**engine_arguments(model), **mesh.engine_arguments()}
        with Worker(EngineHost, arguments, 1) as engine:
            answers = engine.ask("generate", prompts, 12)
        loaded = json.loads((mesh.mailbox.folder / REPORT_NAME).read_text())
    reference = AutoModelForCausalLM.from_pretrained(qwen.folder, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + list(answer.tokens)])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(12), list(answer.tokens)]
        assert float((wanted - torch.tensor(answer.logprobs)).abs().max()) < LOGPROB_TOLERANCE
        assert len(set(answer.tokens)) > 1
    attention = sum(info.nbytes for name, info in checkpoint.tensors.items() if not is_expert_tensor(name))
    assert (loaded["bytes_read"], loaded["bytes_fetched"]) == (attention, attention)
    assert qwen.proxy.sent == {qwen.path(FILE): attention}
    assert bytes_asked_for(qwen.proxy, checkpoint, is_expert_tensor) == 0
    assert bytes_asked_for(qwen.proxy, checkpoint, lambda name: not is_expert_tensor(name)) == attention
