"""A short run of benchmarks.chaos: kills, hangs and cuts under traffic that is checked to the token."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.mesh

MINUTES, SEED = 0.6, 4
FAULTS = ("expert_kill", "expert_hang", "attention_kill", "controller_kill", "kv_hang", "cut")
ROOM = 1.1
"""For descriptors that come and go with connections."""


def test_nothing_is_lost_and_nothing_is_left_behind() -> None:
    options = ["--minutes", str(MINUTES), "--seed", str(SEED), "--faults", ",".join(FAULTS)]
    command = [sys.executable, "-m", "benchmarks.chaos", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["wrong"], result["lost"], result["not_whole_again"]) == (0, 0, 0), done.stdout[-4000:]
    assert result["compared_tokens"] > 0
    assert sum(result["faults"].values()) > 0
    before, after = result["before"], result["after"]
    assert after["processes"] == before["processes"]
    assert after["shared_memory"] == before["shared_memory"]
    assert after["sockets"] <= ROOM * before["sockets"]
    assert after["files"] <= ROOM * before["files"]
