"""The replay benchmark: its engine model on traces that can be worked out by hand, and its targets on real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prefix_routing import Engine, LeastLoadedPolicy, OurPolicy, replay, run, speed
from benchmarks.traces import KINDS, TracedRequest, possible_hits, read_trace, synthetic_trace
from expertmesh.errors import ConfigError
from expertmesh.routing.requests import Removed, Stored

ROOT = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("EXPERTMESH_SHARED_DATA", ROOT.parent / "shared" / "data"))
MOONCAKE = SHARED_DATA / "traces" / "mooncake_synthetic_trace.jsonl"


def test_fifo_by_hand() -> None:
    trace = [TracedRequest(0.0, (1, 2, 3, 4)), TracedRequest(1.0, (1, 2, 9)), TracedRequest(10.0, (1, 2, 3, 4))]
    # One replica, a block a second: 0..4; waits to 4 and computes block 9 until 5; all held, done at once.
    assert replay(trace, LeastLoadedPolicy(1), 1, 100, 1.0) == {
        "hit": round(6 / 11, 4),
        "imbalance": 1.0,
        "wait_p50_s": 4.0,
        "wait_p99_s": 4.0,
    }
    assert possible_hits(trace) == 6
    assert speed(trace, 2) == pytest.approx(5 / (0.7 * 2 * 10))


def test_the_least_recently_used_block_goes_first_and_a_prompts_end_before_its_beginning() -> None:
    engine = Engine(4)
    assert engine.keep((1, 2)) == (Stored((1, 2)),)
    assert engine.keep((3, 4)) == (Stored((3, 4)),)
    assert engine.held((1, 2, 9)) == 2
    assert engine.keep((1, 2, 9)) == (Stored((9,)), Removed((4,)))
    assert engine.held((3, 4)) == 1


def test_possible_hits_are_prefixes() -> None:
    trace = [TracedRequest(0, (1, 2, 3)), TracedRequest(0, (7, 2, 3)), TracedRequest(0, (1, 2, 5))]
    assert possible_hits(trace) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_traces(kind: str) -> None:
    trace = synthetic_trace(kind, seed=3, requests=300)
    assert trace == synthetic_trace(kind, seed=3, requests=300)
    assert trace != synthetic_trace(kind, seed=4, requests=300)
    assert len(trace) == 300
    assert [r.arrival_s for r in trace] == sorted(r.arrival_s for r in trace)
    assert possible_hits(trace) > 0


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"timestamp": "x", "hash_ids": []}', '{"timestamp": 1}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 1, "hash_ids": [1]}\n' + line)
    with pytest.raises(ConfigError, match=r"trace\.jsonl, line 2"):
        read_trace(file)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").touch()
    with pytest.raises(ConfigError, match="no request"):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [11, 12])
def test_hits_and_balance_hold_on_other_traces(kind: str, seed: int) -> None:
    trace = synthetic_trace(kind, seed, requests=4000, duration_s=1200)
    possible = possible_hits(trace) / sum(len(request.blocks) for request in trace)
    ours = replay(trace, OurPolicy(8), 8, 8000, speed(trace, 8))
    assert ours["hit"] >= 0.97 * possible
    assert ours["imbalance"] <= 1.2


@pytest.mark.skipif(
    not MOONCAKE.exists(), reason="the shared data folder with Mooncake's trace is not beside the checkout"
)
def test_the_targets_on_mooncakes_trace() -> None:
    requests = read_trace(MOONCAKE)
    for order in (requests, requests[::-1]):  # a second trace of the same kind: the last prompts first
        span = requests[-1].arrival_s
        trace = order if order is requests else [TracedRequest(span - r.arrival_s, r.blocks) for r in order]
        policies = run(trace, 8, 8000)["policies"]
        assert isinstance(policies, dict)
        assert policies["ours"]["hit"] >= 0.63
        assert policies["ours"]["imbalance"] <= 1.2
        assert policies["ours"]["wait_p50_s"] <= policies["affinity_fallback"]["wait_p50_s"] / 2


def test_the_command_prints_the_issues_json(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 1536, "output_length": 1, "hash_ids": [i % 3, 10 + i % 3, 100 + i]}
        for i in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "benchmarks.prefix_routing", "--trace", str(file), "--replicas", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"possible_hit", "policies"}
    assert result["possible_hit"] == round(114 / 180, 4)
    assert set(result["policies"]) == {"ours", "random", "least_loaded", "affinity", "affinity_fallback"}
    for policy in result["policies"].values():
        assert set(policy) == {"hit", "imbalance", "wait_p50_s", "wait_p99_s"}
        assert policy["hit"] <= result["possible_hit"]
