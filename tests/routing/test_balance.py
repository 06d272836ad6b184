"""The figures of `benchmarks.balance` that a change must not lose, against the LP and EPLB as installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import balance
from benchmarks.peers import eplb_slots, lp_max_load, round_robin_loads
from expertmesh.routing.placement import Limits, applied, balancedness, loaded_slots, plan

SHARDS, REDUNDANT, LAYERS, EXPERTS = 16, 32, 6, 128
Floats = np.ndarray[Any, np.dtype[np.float64]]


def mixed(rng: np.random.Generator, kind: str) -> Floats:
    """Loads [layers, experts] of some kind."""
    if kind == "log-normal":
        return balance.log_normal(rng, LAYERS, EXPERTS)
    if kind == "zipf":
        return np.array([rng.permutation(1 / np.arange(1, EXPERTS + 1)) for _ in range(LAYERS)])
    loads = rng.uniform(0.5, 1.5, (LAYERS, EXPERTS))
    for layer, hot in enumerate(np.array([rng.permutation(EXPERTS)[:16] for _ in range(LAYERS)])):
        if kind == "one expert":  # 30 % of all tokens
            loads[layer, hot[0]] = loads[layer].sum() * 0.43
        elif kind == "two hot sets":
            loads[layer, hot] *= 12
    return loads


KINDS = ("log-normal", "zipf", "one expert", "two hot sets", "uniform")


@pytest.mark.parametrize("shards", [8, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_is_within_2_percent_of_the_lp(kind: str, shards: int) -> None:
    loads = mixed(np.random.default_rng(1), kind)
    counts = balance.expectation(loads)
    judged = balance.Judged(eplb_slots(loads, shards, REDUNDANT), EXPERTS)
    assert judged.of_lp(counts) >= 0.98
    assert (judged.rows(counts).max(axis=1) >= judged.lp(counts) * (1 - 1e-9)).all(), "better than the optimum"


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_subject_is_followed_within_8_steps(kind: str) -> None:
    rng = np.random.default_rng(2)
    old, new = mixed(rng, kind), mixed(rng, kind)
    start = loaded_slots(old, SHARDS, (EXPERTS + REDUNDANT) // SHARDS, 1)
    everyone: dict[str, Any] = {"redundancy": 1, "rates": np.ones(SHARDS), "ready": np.ones(SHARDS, dtype=bool)}
    unchanged = applied(start, plan(start, old, **everyone, limits=Limits(steps=8)))
    assert balancedness(balance.Judged(unchanged, EXPERTS).rows(balance.expectation(old))) >= 0.985
    assert (unchanged != start).mean() <= 0.01
    moves = plan(start, new, **everyone, limits=Limits(steps=8))
    after = applied(start, moves)
    assert balancedness(balance.Judged(after, EXPERTS).rows(balance.expectation(new))) >= 0.95
    assert (after != start).mean() <= 0.1


def test_the_lp_of_a_case_done_by_hand() -> None:
    """30 tokens are fixed on shard 0, 50 may go to 0 or 1, 20 to 1 or 2: all 20 to 2, and 40 are left for 0 and 1."""
    copies = np.array([[0, -1], [0, 1], [1, 2]], dtype=np.int32)
    assert lp_max_load(np.array([30.0, 50, 20]), copies, 3) == pytest.approx(40.0)


def test_round_robin_of_a_case_done_by_hand() -> None:
    slots = np.array([[[0, 1]], [[1, -1]], [[2, 1]]], dtype=np.int32)
    assert round_robin_loads(np.array([[10.0, 30, 5]]), slots).tolist() == [[20.0, 10.0, 15.0]]


def test_eplb_places_every_expert() -> None:
    slots = eplb_slots(balance.log_normal(np.random.default_rng(0), 2, 128), 16, 32)
    assert slots.shape == (16, 2, 10)
    for layer in range(2):
        assert set(slots[:, layer].ravel().tolist()) == set(range(128))


def test_a_file_of_loads_gives_the_documented_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / "loads.npz"
    np.savez(path, old=balance.log_normal(rng, 2, 64), new=balance.log_normal(rng, 2, 64))
    report = balance.main(
        ["--loads", str(path), "--shards", "4", "--redundant", "9", "--batch", "32", "--quick"],
    )
    assert {"static", "eplb", "ours", "unchanged", "dispatch", "plan_cpu_s"} <= report.keys()
    assert {"round_robin", "ours", "lp", "moved"} <= report["eplb"].keys()
    assert report["ours"].keys() == {"0", "2", "4", "8", "16"}
    assert all(at.keys() == {"balancedness", "moved"} for at in report["ours"].values())
    assert report["dispatch"].keys() == {"of_lp", "us_per_layer"}
    assert report["batches"].keys() == {"32"}
    printed = capsys.readouterr().out.splitlines()
    assert balance.json.loads(printed[-1]) == report
    assert "2 x 64 experts, 12 redundant slots, 4 shards" in printed[1]


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"old": np.ones((2, 4))}, "not arrays"),
        ({"old": np.ones((2, 4)), "new": np.ones((2, 5))}, "both must be"),
        ({"old": np.ones(4), "new": np.ones(4)}, "both must be"),
        ({"old": np.ones((2, 4)), "new": -np.ones((2, 4))}, "not negative"),
        ({"old": np.ones((2, 4)), "new": np.zeros((2, 4))}, "some load"),
        ({"old": np.full((2, 4), np.nan), "new": np.ones((2, 4))}, "finite"),
    ],
)
def test_a_file_that_holds_no_loads_is_refused(tmp_path: Path, arrays: dict[str, Floats], what: str) -> None:
    path = tmp_path / "loads.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=what):
        balance.read_loads(path)
