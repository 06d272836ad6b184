"""Links between the machines of a mesh, cut and joined again while requests run.

Ingress and controller are on the head, the attention replica is on the second machine, both shards are on the third,
each expert on one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from expertmesh import Client
from tests.nodes.cluster import HEAD, HTTP_PORT, RayMachines, eventually, serving
from tests.nodes.witness import MODEL, Epochs, replicas, traffic
from tests.support.netns import Network, network, why_not

pytestmark = [pytest.mark.mesh, pytest.mark.long, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

RESOURCES = {HEAD: {}, "attention": {"attention": 1}, "experts": {"shard": 2}}
LINKS = [("attention", "experts"), (HEAD, "experts"), (HEAD, "attention")]
URL = f"http://127.0.0.1:{HTTP_PORT}"
CUT_S = 6.0
"""More than `experts.heartbeat_timeout_s`; less than Ray waits before it takes a node for dead."""
UNAVAILABLE_S = 15.0
SOON_S = 60.0


@pytest.fixture(scope="module")
def folder(family: Callable[[str], Path]) -> Path:
    return family("qwen3_moe")


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    with network(*RESOURCES) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(net: Network, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayMachines]:
    logs = tmp_path_factory.mktemp("cut-links")
    config: dict[str, Any] = {
        "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32", "cache_dir": str(logs)},
        "ingress": {"port": HTTP_PORT},
        "attention": {"cpus": 0, "kv_cache_gib": 0.25, "resources": {"attention": 1}},
        "experts": {"cpus": 0, "resources": {"shard": 1}},
        "routing": {
            "bind_host": "auto",
            "frame_deadline_ms": 2000,
            "connect_timeout_s": 2,
            "unavailable_timeout_s": UNAVAILABLE_S,
            "rebalance": {"enabled": False},
        },
    }
    with serving(net, RESOURCES, config, logs) as machines:
        yield machines


def everybody(net: Network) -> dict[str, set[int]]:
    """The processes of each deployment's replicas."""
    where = {"controller": HEAD, "ingress": HEAD, "attention": "attention", "experts": "experts"}
    return {deployment: replicas(net.processes(machine), deployment) for deployment, machine in where.items()}


def is_whole(client: Client) -> bool:
    """Whether everything serves, and the attention replica goes by the newest table."""
    status = client.mesh.status()
    epoch = status.placement.epoch
    return (
        status.health == "ok"
        and [shard.ready for shard in status.shards] == [True, True]
        and [replica.epoch for replica in status.attention] == [epoch]
    )


@pytest.mark.parametrize("link", LINKS, ids="-".join)
def test_a_link_is_cut_and_joined_again(
    net: Network, cluster: RayMachines, folder: Path, link: tuple[str, str]
) -> None:
    before = everybody(net)
    assert {deployment: len(pids) for deployment, pids in before.items()} == {
        "controller": 1, "ingress": 1, "attention": 1, "experts": 2
    }  # fmt: skip
    epochs = Epochs(URL, lambda: net.processes("attention"))
    with net.inside(HEAD), Client(base_url=URL, timeout=30, max_retries=0) as client, epochs.noted():
        eventually(lambda: is_whole(client), SOON_S)
        with traffic(URL, folder) as running:
            eventually(lambda: running.answered >= 8, SOON_S)
            waits = client.mesh.status().attention[0].dispatch.waits
            net.sever(*link)
            try:
                time.sleep(CUT_S)  # as long as the cut is to last
            finally:
                net.mend(*link)
            answered = running.answered
            eventually(lambda: running.answered >= answered + 12, SOON_S)
            eventually(lambda: is_whole(client), SOON_S)
            if link == ("attention", "experts"):
                assert client.mesh.status().attention[0].dispatch.waits > waits, "no frame was in flight"
        assert running.judge.failed == []
        assert running.judge.wrong == 0
        assert everybody(net) == before, "a cut that is over before Ray gives a node up ends nothing"
    epochs.check()


def test_experts_that_stay_out_of_reach_end_the_requests_that_need_them(
    net: Network, cluster: RayMachines, folder: Path
) -> None:
    request = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0}
    epochs = Epochs(URL, lambda: net.processes("attention"))
    with net.inside(HEAD), httpx.Client(base_url=URL, timeout=90) as client, epochs.noted():
        right = client.post("/v1/completions", json=request).raise_for_status().json()["choices"]
        net.sever("attention", "experts")
        try:
            refused = client.post("/v1/completions", json=request)
        finally:
            net.mend("attention", "experts")
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert int(refused.headers["Retry-After"]) > 0

        def answers() -> bool:
            said = client.post("/v1/completions", json=request)
            assert said.status_code in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE)
            if said.status_code != httpx.codes.OK:
                return False
            assert said.json()["choices"] == right
            return True

        eventually(answers, SOON_S)
        with Client(base_url=URL, timeout=30, max_retries=0) as mesh:
            eventually(lambda: is_whole(mesh), SOON_S)
    epochs.check()
