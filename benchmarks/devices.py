"""Shards that take their time: as long as if each had a device of its own, or so many times longer than they compute.

Four shards on two cores together take as long for a lopsided load as for an even one. With a pace each call of a
shard's kernel lasts at least so long for every (token, expert) pair, without a processor, so that the shard with the
most pairs decides how long a step takes, as it does where each shard has an accelerator. The results stay the kernel's.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

_PACE = "EXPERTMESH_BENCHMARK_PAIR_US"


class Paced:
    """A shard's kernel that waits until `seconds` for each pair of the call have passed."""

    def __init__(self, kernel: Any, seconds: float) -> None:
        self._kernel = kernel
        self._seconds = seconds

    def compute(self, layer: int, body: Any) -> Any:
        """As deployments.experts.server.Kernel.compute."""
        end = time.perf_counter() + self._seconds * len(body.experts)
        y = self._kernel.compute(layer, body)
        time.sleep(max(0.0, end - time.perf_counter()))
        return y


class Slowed:
    """A shard's kernel that takes `factor` times as long as it computes; the processor is free meanwhile."""

    def __init__(self, kernel: Any, factor: float) -> None:
        self._kernel = kernel
        self._factor = factor

    def compute(self, layer: int, body: Any) -> Any:
        """As deployments.experts.server.Kernel.compute."""
        begin = time.perf_counter()
        y = self._kernel.compute(layer, body)
        time.sleep((self._factor - 1) * (time.perf_counter() - begin))
        return y


def pace_shards(pair_us: float) -> None:
    """Lets the shards of a Ray that this process starts from now on take at least `pair_us` microseconds a pair."""
    os.environ[_PACE] = str(pair_us)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(
        {"runtime_env": {"worker_process_setup_hook": "benchmarks.devices.pace_this_process"}}
    )


def pace_this_process() -> None:
    """Ray calls it in each of its worker processes."""
    from expertmesh.deployments.experts.server import FrameServer

    begin = FrameServer.__init__

    def paced(self: FrameServer, listeners: Any, secret: Any, me: Any, kernel: Any, *others: Any, **more: Any) -> None:
        begin(self, listeners, secret, me, Paced(kernel, float(os.environ[_PACE]) * 1e-6), *others, **more)

    FrameServer.__init__ = paced  # type: ignore[method-assign]
