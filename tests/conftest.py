"""Parts that are slow to start and shared by the whole run: checkpoints and one mesh of the demo model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.timing import free_port
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import load_config
from tests.support.otlp import Collector, collector

if TYPE_CHECKING:
    from expertmesh.deployments.local import LocalMesh


logging.getLogger("expertmesh").setLevel(logging.WARNING)
"""As in a replica; else it would be the root's, which vLLM's front end changes."""


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a tiny checkpoint of a family, once a run."""
    from benchmarks.checkpoints import write_family

    folder = tmp_path_factory.mktemp("families")

    def written(name: str) -> Path:
        target = folder / name
        return target if target.exists() else write_family(name, target)

    return written


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's checkpoint; built (minutes) where the cache doesn't have it."""
    return model_folder(load_config("demo").model)


@pytest.fixture(scope="session")
def traces() -> Iterator[Collector]:
    """What collects the spans of `demo_mesh`."""
    with collector() as traces:
        yield traces


@pytest.fixture(scope="session")
def demo_mesh(demo_folder: Path, traces: Collector) -> Iterator[LocalMesh]:
    """The demo model on one attention replica and two shards, each expert on one of them."""
    from expertmesh.deployments.local import LocalMesh

    settings = {
        "model": "demo",
        "ingress": {"port": free_port()},
        "attention": {"kv_cache_gib": 0.5, "inactivity_timeout_s": 300},
        "experts": {"cpus": 0.1, "heartbeat_timeout_s": 60},
        # A replacement on two busy cores may take a minute. Experts move only where a test asks for it.
        "routing": {"unavailable_timeout_s": 240, "rebalance": {"interval_s": 100_000}},
        # Traced are requests that a test gives a sampled `traceparent`.
        "telemetry": {"traces_endpoint": traces.url, "traces_sample": 0.0, "dispatch_sample": 1.0},
    }
    with LocalMesh(load_config(settings)) as mesh:
        yield mesh
