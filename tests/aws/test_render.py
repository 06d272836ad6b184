"""Rendering a cluster file: what comes out, and what is refused with which words."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.errors import ConfigError
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.config.secret import looks_like_secret
from expertmesh.platform.render import load_cluster_file, ray_cluster, render_ray_cluster, serve_config
from expertmesh.platform.render.plan import need_of
from tests.aws.conftest import EXAMPLES, ROOT

RENDERED = ROOT / "examples" / "aws" / "rendered"

BASE: dict[str, Any] = {
    "mesh": {
        "model": {"source": "/fsx/models/moe"},
        "attention": {"gpus": 1, "cpus": 8, "kv_cache_gib": 20},
        "experts": {"shards": 4, "redundancy": 2, "cpus": 16},
    },
    "cluster": {
        "region": "us-east-1",
        "subnets": ["subnet-1"],
        "security_groups": ["sg-1"],
        "instance_profile": "mesh-node",
        "images": {"cpu": "mesh:cpu", "gpu": "mesh:gpu"},
        "weights": {"attention_gib": 10, "experts_gib": 200},
        "pools": [
            {"name": "front", "side": "attention", "instance_type": "g6e.12xlarge", "max_nodes": 2},
            {"name": "back", "side": "experts", "instance_type": "r7i.8xlarge", "min_nodes": 1, "max_nodes": 2},
        ],
    },
}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = copy.deepcopy(BASE)
    change(data)
    return data


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_rendered_examples_are_current(example: Path) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/aws` writes them anew."""
    rendered = render_ray_cluster(example)
    for kind, text in (("ray-cluster", rendered.ray_cluster), ("serve", rendered.serve_config)):
        target = RENDERED / f"{example.stem}.{kind}.yaml"
        if os.environ.get("UPDATE_GOLDEN"):
            target.write_text(text)
        assert target.read_text() == text


def test_written_files_are_what_was_rendered(tmp_path: Path) -> None:
    rendered = render_ray_cluster(BASE)
    cluster, serve = rendered.write(tmp_path / "new" / "folder")
    assert (cluster.name, serve.name) == ("ray-cluster.yaml", "serve.yaml")
    assert (cluster.read_text(), serve.read_text()) == (rendered.ray_cluster, rendered.serve_config)


def test_the_five_layouts_are_there() -> None:
    names = {example.stem for example in EXAMPLES}
    assert names == {"p5en-gpu-experts", "p6-b200", "cpu-experts-r7i", "trn2-colocated", "inf2-colocated"}


def test_each_side_lands_on_its_own_nodes() -> None:
    file = load_cluster_file(BASE)
    nodes = ray_cluster(file)["available_node_types"]
    [application] = serve_config(file.mesh)["applications"]
    mesh = application["args"]["mesh"]
    assert mesh["attention"]["resources"] == {"expertmesh_attention": 1}
    assert mesh["experts"]["resources"] == {"expertmesh_experts": 1}
    assert nodes["front"]["resources"] == {"CPU": 48, "expertmesh_attention": 4, "GPU": 4}
    assert nodes["back"]["resources"] == {"CPU": 32, "expertmesh_experts": 2}
    assert nodes["head"]["resources"] == {"CPU": 16}
    assert nodes["back"]["labels"]["expertmesh.io/side"] == "experts"


def test_the_serve_config_holds_a_mesh_that_the_builder_takes() -> None:
    config = serve_config(load_cluster_file(BASE).mesh)
    mesh = MeshConfig.model_validate(config["applications"][0]["args"]["mesh"])
    assert mesh.routing.bind_host == "auto"
    assert str(mesh.routing.secret_file) == "~/expertmesh-keys/cluster"
    assert mesh.experts.shards == 4
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_what_the_user_set_for_the_network_is_kept() -> None:
    data = changed(lambda d: d["mesh"].update(routing={"bind_host": "10.0.0.1", "secret_file": "/run/keys/mesh"}))
    routing = serve_config(load_cluster_file(data).mesh)["applications"][0]["args"]["mesh"]["routing"]
    assert routing == {"bind_host": "10.0.0.1", "secret_file": "/run/keys/mesh"}


def test_key_pair_proxy_fsx_tags_and_variables_reach_the_file() -> None:
    data = changed(
        lambda d: d["cluster"].update(
            key_pair={"name": "ops", "file": "~/.ssh/ops.pem"},
            ssh_proxy_command="ssh -W %h:%p bastion",
            fsx={"dns_name": "fs-1.fsx", "mount_name": "m", "path": "/models"},
            tags={"team": "serving"},
            environment={"A": "1"},
            log_level="debug",
        )
    )
    rendered = ray_cluster(load_cluster_file(data))
    assert rendered["auth"]["ssh_private_key"] == "~/.ssh/ops.pem"
    assert rendered["auth"]["ssh_proxy_command"] == "ssh -W %h:%p bastion"
    assert {kind["node_config"]["KeyName"] for kind in rendered["available_node_types"].values()} == {"ops"}
    assert "mount -t lustre -o relatime,flock fs-1.fsx@tcp:/m /models" in rendered["initialization_commands"][-1]
    options = rendered["docker"]["run_options"]
    assert {"-v /models:/models", "-e A=1", "-e RAY_BACKEND_LOG_LEVEL=debug"} <= set(options)
    specifications = rendered["available_node_types"]["back"]["node_config"]["TagSpecifications"]
    assert {"Key": "team", "Value": "serving"} in specifications[0]["Tags"]


def test_neuron_devices_and_efa_reach_the_container() -> None:
    nodes = {example.stem: yaml.safe_load(render_ray_cluster(example).ray_cluster) for example in EXAMPLES}
    inferentia = nodes["inf2-colocated"]["available_node_types"]["attention"]
    assert [o for o in inferentia["docker"]["worker_run_options"] if o.startswith("--device=/dev/neuron")] == [
        f"--device=/dev/neuron{index}" for index in range(12)
    ]
    assert inferentia["resources"]["neuron_cores"] == 24
    efa = nodes["p5en-gpu-experts"]["available_node_types"]["experts"]["docker"]["worker_run_options"]
    assert {"--device=/dev/infiniband", "-e FI_PROVIDER=efa"} <= set(efa)


def test_spare_slots_and_the_one_to_load_into_count() -> None:
    """128 experts of 1 GiB on 4 shards, redundancy 2: 64 slots, and 10 more."""
    data = changed(lambda d: d["cluster"]["weights"].update(experts_gib=128, experts_per_layer=128))
    data["mesh"]["experts"]["spare_slots"] = 9
    file = load_cluster_file(data)
    assert need_of(file.mesh, file.cluster, "experts").weights_gib == 74
    data["mesh"]["routing"] = {"rebalance": {"enabled": False}}
    file = load_cluster_file(data)
    assert need_of(file.mesh, file.cluster, "experts").weights_gib == 73


def test_shards_that_come_and_go_need_room_for_the_most_and_memory_for_the_fewest() -> None:
    """200 GiB of experts twice, on 2 to 4 shards: 200 GiB each where there are 2."""
    scaling = {"autoscaling": {"experts": {"min_shards": 2, "max_shards": 4}}}
    file = load_cluster_file(changed(lambda d: d["mesh"].update(scaling)))
    assert need_of(file.mesh, file.cluster, "experts").weights_gib == 200
    more = {"autoscaling": {"experts": {"min_shards": 2, "max_shards": 5}}}
    with pytest.raises(ConfigError, match="5 experts replicas, but the pools hold 2 x 1"):
        render_ray_cluster(changed(lambda d: d["mesh"].update(more)))


def test_no_key_of_the_file_looks_like_a_secret() -> None:
    from expertmesh.platform.render.aws_sections import AwsCluster

    schema = AwsCluster.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {key for section in sections for key in section.get("properties", {})}
    assert not [key for key in keys if looks_like_secret(key)]


def _pool(data: dict[str, Any], index: int, **change: Any) -> None:
    data["cluster"]["pools"][index].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cluster"), "cluster: missing"),
        (lambda d: d.update(aws={}), "aws: unknown key; allowed: mesh, cluster"),
        (lambda d: d["mesh"].update(atention={}), "mesh.atention: unknown key; did you mean 'attention'"),
        (lambda d: d["cluster"].pop("subnets"), "cluster.subnets: "),
        (lambda d: d["cluster"].update(security_groups=["launch-wizard"]), "'launch-wizard' must start with sg-"),
        (lambda d: d["cluster"].update(api_key="x"), "cluster.api_key: a secret does not belong"),
        (
            lambda d: d["mesh"]["model"].update(source="models/moe"),
            "mesh.model.source: 'models/moe' is a relative path",
        ),
        (lambda d: d["mesh"].update(routing={"transport": "unix"}), "mesh.routing.transport: 'unix' does not reach"),
        (lambda d: d["mesh"].update(kv_store={"url": "embedded"}), "mesh.kv_store.url: 'embedded' is on one machine"),
        (lambda d: _pool(d, 0, instance_type="p5e.48xlarge"), "'p5e.48xlarge' is not in the hardware table"),
        (lambda d: _pool(d, 1, min_nodes=3), "2 is below min_nodes (3)"),
        (lambda d: _pool(d, 1, market="capacity-block"), "r7i.8xlarge is not sold in capacity blocks"),
        (
            lambda d: _pool(d, 0, instance_type="p5.48xlarge", market="capacity-block"),
            "market capacity-block needs capacity_reservation_id",
        ),
        (lambda d: _pool(d, 1, efa=True), "r7i.8xlarge has no EFA"),
        (lambda d: _pool(d, 1, name="front"), "the pool name 'front' is taken"),
        (lambda d: _pool(d, 1, name="head"), "the pool name 'head' is taken"),
        (lambda d: d["cluster"]["images"].pop("gpu"), "images.gpu: needed, because there are gpu nodes"),
        (
            lambda d: (_pool(d, 0, instance_type="p5.48xlarge"), d["cluster"].update(internal_ips=False)),
            "EC2 gives such instances no public address",
        ),
        (lambda d: d["cluster"]["pools"].pop(), "none has side 'experts'"),
        (
            lambda d: d["mesh"].update(experts={"mode": "colocated"}),
            "back is for experts, but experts.mode is colocated",
        ),
        (
            lambda d: (d["cluster"]["images"].update(neuron="n"), _pool(d, 0, instance_type="inf2.48xlarge")),
            "front has Neuron devices, whose compiler takes whole graphs; use experts.mode: colocated",
        ),
        (lambda d: d["mesh"]["experts"].update(shards=5), "5 experts replicas, but the pools hold 2 x 2 (back) = 4"),
        (
            lambda d: d["mesh"].update(autoscaling={"attention": {"min_replicas": 1, "max_replicas": 9}}),
            "9 attention replicas, but the pools hold 2 x 4 (front) = 8",
        ),
        (lambda d: _pool(d, 1, replicas_per_node=3), "replicas_per_node is 3, but r7i.8xlarge holds 2 (CPU is short)"),
        (
            lambda d: d["mesh"]["attention"].update(kv_cache_gib=40),
            "weights 10.0 + KV cache 40.0 = 50.0 GiB; 1 L40S x 48 GiB x 0.9 = 43.2 GiB: 6.8 GiB too much",
        ),
        (
            lambda d: d["cluster"]["weights"].update(experts_gib=600),
            "expert shard on r7i.8xlarge: weights 300.0 + KV cache 0.0 = 300.0 GiB; 256 GiB of host memory",
        ),
    ],
)
def test_what_cannot_work_is_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render_ray_cluster(changed(change))
    assert message in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    data = changed(lambda d: (d["mesh"].update(x=1), d["cluster"].update(y=2)))
    with pytest.raises(ConfigError) as caught:
        load_cluster_file(data)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["mesh.x", "cluster.y"]


def test_a_file_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: can't be read"):
        load_cluster_file("nowhere.yaml")
