"""The demo checkpoint's maths, texts and publishing; the whole build runs where tests serve the demo model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.demo import slicing
from expertmesh.platform.checkpoints.demo.publish import build_once
from expertmesh.platform.checkpoints.demo.recipe import RECIPE
from expertmesh.platform.checkpoints.demo.source import unpermute_rope
from expertmesh.platform.checkpoints.demo.texts import collect, is_prose, token_windows

HIDDEN, NEURONS, TOKENS = 16, 48, 600
SETTINGS = slicing.SliceSettings(
    experts=4,
    top_k=2,
    shared_neurons=16,
    router_ridge=0.01,
    router_spread=0.1,
    shared_ridge=0.01,
    profile_tokens=300,
    profile_dimensions=32,
    cluster_rounds=5,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_block() -> tuple[Tensor, Tensor, Tensor]:
    """Input [T, H], activations [T, F] and down projection [H, F] of a random gated block."""
    source = generator()
    hidden = torch.randn(TOKENS, HIDDEN, generator=source)
    gate, up = torch.randn(2, NEURONS, HIDDEN, generator=source)
    activations = F.silu(hidden @ gate.T) * (hidden @ up.T)
    return hidden, activations, torch.randn(HIDDEN, NEURONS, generator=source)


def relative_error(output: Tensor, wanted: Tensor) -> float:
    return float((output - wanted).pow(2).sum() / wanted.pow(2).sum())


def test_the_module_docstrings_example() -> None:
    activations = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 2.0**0.5]])
    shared, others = slicing.strongest_neurons(activations, torch.ones(1, 4), count=2)
    assert shared.tolist() == [0, 2]
    assert sorted(others.tolist()) == [1, 3]


def test_a_weak_activation_with_a_strong_output_counts_as_strong() -> None:
    activations = torch.tensor([[1.0, 2.0, 3.0]])
    down = torch.tensor([[10.0, 1.0, 1.0]])
    shared, _ = slicing.strongest_neurons(activations, down, count=1)
    assert shared.tolist() == [0]


def test_clusters_find_the_neurons_that_fire_together() -> None:
    """Neuron n fires on tokens of kind n % 4 only, with signs that must not matter."""
    kinds = torch.randint(4, (400,), generator=generator())
    fires = (kinds[:, None] == torch.arange(32)[None] % 4).float()
    activations = fires * torch.randn(400, 32, generator=generator(1))
    profiles = slicing.firing_profiles(activations, 64, generator(2))
    clusters = slicing.balanced_clusters(profiles, 4, 8, generator(3))
    assert sorted(clusters.flatten().tolist()) == list(range(32))
    assert all(len({neuron % 4 for neuron in members}) == 1 for members in clusters.tolist())


def test_clusters_are_of_equal_size_even_if_all_want_the_same() -> None:
    profiles = F.normalize(torch.ones(12, 8) + 0.01 * torch.randn(12, 8, generator=generator()), dim=1)
    clusters = slicing.balanced_clusters(profiles, 3, 4, generator(1))
    assert clusters.shape == (3, 4)
    assert sorted(clusters.flatten().tolist()) == list(range(12))


def test_clusters_refuse_neurons_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 neurons can't be cut into 4 experts"):
        slicing.balanced_clusters(torch.eye(10), 4, 1, generator())


def test_group_outputs_are_norms_of_centred_outputs() -> None:
    _, activations, down = random_block()
    groups = torch.arange(NEURONS).reshape(6, 8)
    wanted = []
    for members in groups:
        output = activations[:, members] @ down[:, members].T
        wanted.append((output - output.mean(0)).norm(dim=1))
    torch.testing.assert_close(slicing.group_outputs(activations, down, groups), torch.stack(wanted, 1))


def test_the_router_learns_a_linear_preference() -> None:
    source = generator()
    hidden = torch.randn(TOKENS, HIDDEN, generator=source)
    preference = torch.randn(4, HIDDEN, generator=source)
    router = slicing.fit_router(hidden, hidden @ preference.T + 5, ridge=1e-4, spread=0.1)
    ids, weights = slicing.route(hidden, router, top_k=2)
    best = (hidden @ (preference - preference.mean(0)).T).topk(2, -1).indices
    assert (ids == best).float().mean() > 0.98
    torch.testing.assert_close(weights.sum(1), torch.ones(TOKENS))
    assert float((hidden @ router.T).std()) == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(router.sum(0), torch.zeros(HIDDEN), atol=1e-6, rtol=0)


def test_gains_are_one_on_average_over_the_chosen() -> None:
    ids, weights = torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]])
    assert slicing.expert_gains(ids, weights, experts=4).tolist() == [[0.5, 0.0, 1.5, 0.0]]


def test_ridge_solution_has_no_gradient_left() -> None:
    source = generator()
    inputs, targets = torch.randn(90, 7, generator=source), torch.randn(90, 3, generator=source)
    solution = slicing.ridge_solve(inputs, targets, ridge=0.3).requires_grad_()
    loss = (targets - inputs @ solution).pow(2).sum() + 0.3 * inputs.pow(2).sum(0).mean() * solution.pow(2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert solution.grad is not None
    assert float(solution.grad.abs().max()) < 1e-3 * float((inputs.T @ targets).abs().max())


def test_the_cut_is_nearly_exact_while_every_expert_runs() -> None:
    hidden, activations, down = random_block()
    everything = replace(SETTINGS, top_k=SETTINGS.experts, router_spread=1e-6)
    _, output = slicing.slice_block(hidden, activations, down, everything, generator())
    torch.testing.assert_close(output, activations @ down.T, rtol=1e-3, atol=1e-3)


def test_the_cut_uses_every_neuron_once_and_its_parts_give_its_output() -> None:
    hidden, activations, down = random_block()
    block, output = slicing.slice_block(hidden, activations, down, SETTINGS, generator())
    assert sorted([*block.shared.tolist(), *block.groups.flatten().tolist()]) == list(range(NEURONS))
    ids, weights = slicing.route(hidden, block.router, SETTINGS.top_k)
    rebuilt = activations[:, block.shared] @ block.shared_down.T
    for token in range(TOKENS):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            members = block.groups[expert]
            rebuilt[token] += SETTINGS.top_k * weight * (down[:, members] @ activations[token, members])
    torch.testing.assert_close(rebuilt, output, rtol=1e-3, atol=1e-3)


def test_routing_and_refit_each_lose_less_than_doing_without() -> None:
    hidden, activations, down = random_block()
    block, output = slicing.slice_block(hidden, activations, down, SETTINGS, generator())
    wanted = activations @ down.T
    gains = slicing.expert_gains(*slicing.route(hidden, block.router, SETTINGS.top_k), SETTINGS.experts)
    unrefit = activations.clone()
    unrefit[:, block.groups.flatten()] *= gains.repeat_interleave(block.groups.shape[1], dim=1)
    by_router = relative_error(unrefit @ down.T, wanted)
    unrouted = activations.clone()
    unrouted[:, block.groups[SETTINGS.top_k :].flatten()] = 0
    assert relative_error(output, wanted) < by_router < relative_error(unrouted @ down.T, wanted)


def test_rotary_pairs_come_apart_again() -> None:
    """GGUF's order of one head of 4 rows is x0 y0 x1 y1; transformers' is x0 x1 y0 y1."""
    weight = np.array([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]], dtype=np.float32)
    assert unpermute_rope(weight, heads=2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_calibration_and_held_out_texts_share_no_paragraph() -> None:
    texts = collect()
    calibration = {paragraph for text in texts.calibration for paragraph in text.split("\n\n")}
    held_out = {paragraph for text in texts.held_out for paragraph in text.split("\n\n")}
    assert not calibration & held_out
    assert sum(map(len, calibration)) > 250_000
    assert sum(map(len, held_out)) > 60_000
    assert all(map(is_prose, calibration | held_out))


def test_windows_are_whole_disjoint_and_in_the_same_order_each_time() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    texts = ["abcdefgh", "xy", "mnopq"]
    windows = token_windows(texts, tokenizer, length=4, count=10, seed=1)
    assert sorted("".join(map(chr, window)) for window in windows) == ["abcd", "efgh", "mnop"]
    assert windows == token_windows(texts, tokenizer, length=4, count=10, seed=1)
    assert token_windows(texts, tokenizer, length=4, count=2, seed=1) == windows[:2]


def test_another_recipe_goes_into_another_folder() -> None:
    assert RECIPE.folder_name() == replace(RECIPE).folder_name()
    assert replace(RECIPE, seed=1).folder_name() != RECIPE.folder_name()


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")]


def test_a_finished_folder_is_not_built_again(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "weights").write_text("whole")

    for _ in range(2):
        assert (build_once(tmp_path / "cache" / "model", build) / "weights").read_text() == "whole"
    assert len(built) == 1
    assert leftovers(tmp_path / "cache") == ["model"]


def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise CheckpointError("no space")

    with pytest.raises(CheckpointError, match="no space"):
        build_once(tmp_path / "model", fails)
    assert leftovers(tmp_path) == []
    assert build_once(tmp_path / "model", lambda folder: None).is_dir()


def test_builds_at_the_same_time_build_once(tmp_path: Path) -> None:
    """The second one only gets past its wait once the first is done, because the first waits until it is waited for."""
    waited_for = threading.Event()
    built = []

    def build(folder: Path) -> None:
        assert waited_for.wait(30)
        built.append(folder)

    threads = [
        threading.Thread(target=build_once, args=(tmp_path / "model", build, waited_for.set), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(built) == 1
    assert leftovers(tmp_path) == ["model"]


KILLED_BUILD = """
import sys, time
from pathlib import Path
from expertmesh.platform.checkpoints.demo.publish import build_once

def build(folder):
    (folder / "weights").write_text("half")
    print("building", flush=True)
    sys.stdin.read()

build_once(Path(sys.argv[1]), build)
"""


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    target = tmp_path / "model"
    command = [sys.executable, "-c", KILLED_BUILD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        waits: list[bool] = []
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not target.exists()
    assert len(leftovers(tmp_path)) == 1
    build_once(target, lambda folder: None, lambda: waits.append(True))
    assert leftovers(tmp_path) == ["model"]
    assert waits == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cache folder .*file/cache: can't be written"):
        build_once(tmp_path / "file" / "cache" / "model", lambda folder: None)
