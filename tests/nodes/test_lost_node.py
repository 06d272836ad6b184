"""A node is away for so long that Ray gives it up; it comes back, and is started again by hand, while requests run.

Each expert is on a shard beside the attention replica and on one of the node that is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray._raylet

from expertmesh import Client
from tests.nodes.cluster import HEAD, HTTP_PORT, eventually, serving
from tests.nodes.witness import MODEL, Epochs, traffic
from tests.support.netns import network, why_not

pytestmark = [pytest.mark.mesh, pytest.mark.long, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

LOST = "experts"
RESOURCES = {HEAD: {}, "attention": {"attention": 1, "shard": 1}, LOST: {"shard": 1}}
URL = f"http://127.0.0.1:{HTTP_PORT}"
IMPATIENT = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
"""Ray gives a node up after 5 missed health checks; by default each may take 10 s, and comes 3 s after the last."""
SOON_S = 120.0


def settings(folder: Path, logs: Path) -> dict[str, Any]:
    """Two shards that hold everything, one on each node."""
    return {
        "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32", "cache_dir": str(logs)},
        "ingress": {"port": HTTP_PORT},
        "attention": {"cpus": 0, "kv_cache_gib": 0.25, "resources": {"attention": 1}},
        "experts": {"cpus": 0, "resources": {"shard": 1}, "redundancy": 2},
        "routing": {"bind_host": "auto", "rebalance": {"enabled": False}},
    }


def test_a_node_that_ray_has_given_up_comes_back_as_a_new_one(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family("qwen3_moe")
    with (
        network(*RESOURCES) as net,
        serving(net, RESOURCES, settings(folder, tmp_path), tmp_path, environment=IMPATIENT) as cluster,
        net.inside(HEAD),
        Client(base_url=URL, timeout=30, max_retries=0) as client,
    ):
        gcs = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]  # a C extension

        def alive() -> set[str]:
            known = gcs.get_all_node_info(timeout=10).values()
            return {node.node_manager_address for node in known if node.state == 0}  # GcsNodeInfo.ALIVE

        def held() -> dict[str, str]:
            return {shard.shard: shard.node for shard in client.mesh.status().shards}

        def is_whole() -> bool:
            status = client.mesh.status()
            return [s.ready for s in status.shards] == [True, True] and status.placement.redundancy == 2

        eventually(is_whole, SOON_S)
        shards = held()
        nodes = set(shards.values())
        epochs = Epochs(URL, lambda: net.processes("attention"))
        with epochs.noted(), traffic(URL, folder) as running:
            eventually(lambda: running.answered >= 8, SOON_S)
            net.cut(LOST)
            try:
                eventually(lambda: net.addresses[LOST] not in alive(), SOON_S)
                answered = running.answered
                eventually(lambda: running.answered >= answered + 8, SOON_S)
            finally:
                net.join(LOST)
            eventually(lambda: cluster.ended(LOST), SOON_S)  # told that it was given up
            assert net.addresses[LOST] not in alive()
            cluster.stop(LOST)
            eventually(lambda: net.processes(LOST) == [], SOON_S)
            cluster.start(LOST)
            eventually(lambda: is_whole() and shards.items() - held().items() != set(), SOON_S)
            answered = running.answered
            eventually(lambda: running.answered >= answered + 8, SOON_S)
        assert running.judge.failed == []
        assert running.judge.wrong == 0
        after = held()
        assert len(shards.items() & after.items()) == 1, "the shard in reach is the one that it was"
        assert len(set(after.values()) - nodes) == 1, "the other one is on a new node"
        epochs.check()
