"""install -> upgrade -> rollback -> uninstall with the real helm on a stand-in for the API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.api_server import RESOURCES, Resource, Store, api_server
from tests.helm.binaries import helm_binary
from tests.helm.chart import CHART, EXAMPLES, NAME, NAMESPACE, RELEASE, Helm, Object, Refused, example
from tests.helm.schemas import MISSING

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

BY_KIND = {resource.kind: resource for resource in RESOURCES}
TWO_SHARDS: dict[str, Any] = {}
THREE_SHARDS: dict[str, Any] = {
    "mesh": {"experts": {"shards": 3}},
    "workerGroups": {"experts": {"maxReplicas": 3}},
    "valkey": {"enabled": True},
}


class Cluster:
    """helm and what is in the API server."""

    def __init__(self, helm: Helm, store: Store) -> None:
        self.helm = helm
        self.store = store

    def deploy(self, command: str, values: dict[str, Any]) -> None:
        """install or upgrade. What is wrong the server says; it has no OpenAPI document for helm to look into."""
        self.run(command, str(CHART), "--disable-openapi-validation", values=values)

    def run(self, command: str, *arguments: str, values: dict[str, Any] | None = None) -> str:
        return self.helm.run(command, RELEASE, *arguments, "--namespace", NAMESPACE, values=values)

    def get(self, kind: str, name: str = NAME) -> Object:
        resource = BY_KIND[kind]
        return self.store.get(resource, NAMESPACE if resource.namespaced else "", name)

    def ours(self) -> set[tuple[str, str]]:
        """Kind and name of everything but helm's own records and the namespace."""
        return {
            (found["kind"], found["metadata"]["name"])
            for resource in RESOURCES
            for found in self.store.list(resource)
            if found.get("type") != "helm.sh/release.v1" and found["kind"] != "Namespace"
        }

    def shards(self) -> int:
        config = yaml.safe_load(self.get("RayService")["spec"]["serveConfigV2"])
        return int(config["applications"][0]["args"]["mesh"]["experts"].get("shards", 2))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    kubeconfig = tmp_path / "kubeconfig"
    with api_server(kubeconfig, NAMESPACE) as store:
        yield Cluster(Helm(helm_binary(), tmp_path, kubeconfig), store)


def test_install_upgrade_rollback_uninstall(cluster: Cluster) -> None:
    cluster.deploy("install", TWO_SHARDS)
    installed = cluster.ours()
    secret = cluster.get("Secret", f"{NAME}-cluster")["data"]
    uid = cluster.get("RayService")["metadata"]["uid"]
    assert ("RayService", NAME) in installed
    assert cluster.shards() == 2

    cluster.deploy("upgrade", THREE_SHARDS)
    assert cluster.shards() == 3
    assert cluster.ours() - installed == {(kind, f"{NAME}-valkey") for kind in ("Secret", "Service", "StatefulSet")}
    assert cluster.get("Secret", f"{NAME}-cluster")["data"] == secret

    cluster.run("rollback", "1")
    assert cluster.shards() == 2
    assert cluster.ours() == installed
    assert cluster.get("Secret", f"{NAME}-cluster")["data"] == secret
    assert cluster.get("RayService")["metadata"]["uid"] == uid

    history = yaml.safe_load(cluster.run("history", "--output", "yaml"))
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]

    cluster.run("uninstall")
    assert cluster.ours() == set()


def test_passwords_outlive_an_upgrade(cluster: Cluster) -> None:
    cluster.deploy("install", {"valkey": {"enabled": True}})
    before = cluster.get("Secret", f"{NAME}-valkey")["data"]
    cluster.deploy("upgrade", {"valkey": {"enabled": True, "maxMemoryMib": 2048}})
    assert cluster.get("Secret", f"{NAME}-valkey")["data"] == before


def test_a_change_of_the_mesh_alone_leaves_the_ray_cluster_as_it_is(cluster: Cluster) -> None:
    cluster.deploy("install", TWO_SHARDS)
    before = cluster.get("RayService")["spec"]["rayClusterConfig"]
    cluster.deploy("upgrade", {"mesh": {"attention": {"max_num_seqs": 8}}})
    assert cluster.get("RayService")["spec"]["rayClusterConfig"] == before


def test_the_server_refuses_what_the_schema_lets_through(cluster: Cluster) -> None:
    wrong = {"head": {"affinity": {"nodeAfinity": {}}}}
    with pytest.raises(Refused, match="nodeAfinity"):
        cluster.deploy("install", wrong)
    assert ("RayService", NAME) not in cluster.ours()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_installs_and_leaves_nothing(cluster: Cluster, path: Path) -> None:
    cluster.deploy("install", example(path))
    assert cluster.get("RayService")["kind"] == "RayService"
    cluster.run("uninstall")
    assert cluster.ours() == set()


def test_the_stand_in_lists_by_label_and_refuses_twice_the_same_name() -> None:
    store = Store()
    resource = Resource("", "v1", "configmaps", "ConfigMap")
    item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "labels": {"x": "1"}}}
    store.put(resource, NAMESPACE, "a", item, dry=False)
    assert [found["metadata"]["name"] for found in store.list(resource, NAMESPACE, {"x": "1"})] == ["a"]
    assert store.list(resource, NAMESPACE, {"x": "2"}) == []
    assert store.list(resource, "elsewhere") == []
