"""A mesh that follows its load on nodes of two types, which Ray's autoscaler (v2) adds and removes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray._raylet

from expertmesh import Client
from tests.nodes.cluster import HEAD, HTTP_PORT, eventually, serving
from tests.nodes.witness import MODEL, TOKENS, traffic
from tests.support.netns import network, why_not

pytestmark = [pytest.mark.mesh, pytest.mark.long, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

TYPES = {"attention": {"attention": 1}, "experts": {"shard": 2}}
"""Room for one attention replica, and for two shards."""
PACE = {"up_after_s": 3, "down_after_s": 5, "cooldown_s": 5}
BRISK = {"RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "2"}
"""Serve has an HTTP proxy on each node with replicas, which by default keeps a node for 30 s after the last one."""
URL = f"http://127.0.0.1:{HTTP_PORT}"
STREAMS = 8
SOON_S = 150.0


def settings(folder: Path, logs: Path) -> dict[str, Any]:
    """One attention replica and two shards at rest, two and three under load."""
    return {
        "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32", "cache_dir": str(logs)},
        "ingress": {"port": HTTP_PORT},
        "attention": {"cpus": 0, "kv_cache_gib": 0.25, "resources": {"attention": 1}},
        "experts": {"cpus": 0, "resources": {"shard": 1}},
        "routing": {"bind_host": "auto", "rebalance": {"enabled": False}},
        "autoscaling": {
            "interval_s": 1,
            "attention": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3, **PACE},
            "experts": {"min_shards": 2, "max_shards": 3, "busy": 0.05, **PACE},
        },
    }


def test_nodes_of_the_right_type_come_with_the_load_and_go_with_it(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family("qwen3_moe")
    with (
        network(HEAD) as net,
        serving(net, {HEAD: {}}, settings(folder, tmp_path), tmp_path, TYPES, BRISK) as cluster,
        net.inside(HEAD),
        Client(base_url=URL, timeout=30, max_retries=0) as client,
    ):
        gcs = ray._raylet.GcsClient(address=cluster.address)  # type: ignore[attr-defined]  # a C extension

        def nodes() -> Counter[str]:
            known = gcs.get_all_node_info(timeout=10).values()
            alive = [node for node in known if node.state == 0]  # GcsNodeInfo.ALIVE
            return Counter(name for node in alive for name in TYPES if set(TYPES[name]) & set(node.resources_total))

        def serves(attention: int, shards: int) -> bool:
            status = client.mesh.status()
            assert status.placement.missing_experts == 0
            return (
                [replica.ready for replica in status.attention] == [True] * attention
                and [shard.ready for shard in status.shards] == [True] * shards
                and not any(shard.leaving for shard in status.shards)
            )

        assert serves(1, 2)
        assert nodes() == {"attention": 1, "experts": 1}
        with traffic(URL, folder, STREAMS) as running:
            eventually(lambda: serves(2, 3) and nodes() == {"attention": 2, "experts": 2}, SOON_S)
            answered = running.answered
            eventually(lambda: running.answered >= answered + 2 * STREAMS, SOON_S)
        assert running.judge.failed == []
        assert running.judge.wrong == 0
        assert running.judge.compared >= answered * TOKENS / 2, "near ties end the comparison of an answer"
        eventually(lambda: serves(1, 2) and nodes() == {"attention": 1, "experts": 1}, SOON_S)
