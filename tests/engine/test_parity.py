"""Engines whose experts live elsewhere, against monolithic ones; all families are compared by benchmarks.parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.bare import EngineHost, Worker, bare_mesh, engine_arguments
from benchmarks.parity import LOGPROB_TOLERANCE, compare, moe_family, prompts_for, vocabulary_of
from expertmesh.platform.checkpoints import is_expert_tensor, open_checkpoint
from expertmesh.routing.vllm_plugin import LOAD_FORMAT
from expertmesh.routing.vllm_plugin.loader import REPORT_NAME

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", [pytest.param("gpt_oss", marks=pytest.mark.long), "deepseek_v3"])
def test_the_mesh_says_what_one_engine_says(family: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    result = moe_family(name, family(name), tmp_path)
    for run in result["meshes"].values():
        assert run["different"] == 0
        assert run["identical"] > 200
        assert run["max_logprob_diff"] < LOGPROB_TOLERANCE
    assert result["control_caught"]


def test_compiled_and_no_expert_byte_read(family: Callable[[str], Path]) -> None:
    folder = family("qwen3_moe")
    prompts = prompts_for(vocabulary_of(folder), 4)
    checkpoint = open_checkpoint(folder)
    with bare_mesh(folder, 3, redundancy=2) as (mesh, hosts):
        compiled = {**engine_arguments(folder, enforce_eager=False), **mesh.engine_arguments()}
        with Worker(EngineHost, engine_arguments(folder), 1) as mono, Worker(EngineHost, compiled, 1) as engine:
            mono.post("generate", prompts, 24)
            run = compare(mono.take(), engine.ask("generate", prompts, 24))
        assert run["different"] == 0
        assert run["max_logprob_diff"] < LOGPROB_TOLERANCE
        loaded = json.loads((mesh.mailbox.folder / REPORT_NAME).read_text())
        wanted = sum(info.nbytes for name, info in checkpoint.tensors.items() if not is_expert_tensor(name))
        assert loaded["bytes_read"] == wanted
        assert all(host.ask("stats")[0]["frames"] > 0 for host in hosts)


def test_experts_that_stayed_local_stop_the_start(family: Callable[[str], Path]) -> None:
    arguments = engine_arguments(family("qwen3_moe"), load_format=LOAD_FORMAT)  # and nothing that makes them remote
    with Worker(EngineHost, arguments, 1) as engine, pytest.raises(RuntimeError):
        engine.ask("generate", [[11, 12, 13]], 2)
