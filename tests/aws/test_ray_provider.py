"""Rendered cluster files through Ray's own code: its schema, its AWS bootstrap and its node provider, against moto."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UNINITIALIZED,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from expertmesh.platform.config import yaml_text
from expertmesh.platform.hardware import INSTANCE_TYPES, InstanceType, instance_type
from expertmesh.platform.render import ClusterFile, load_cluster_file, ray_cluster
from tests.aws.conftest import EXAMPLES, Requests, aws_account
from tests.aws.template import actions, statements


@dataclass
class Launched:
    """One example after Ray's code started a node of each type in an account that holds what the file refers to."""

    file: ClusterFile
    rendered: dict[str, Any]
    detected: dict[str, Any]
    """Resources by node type, as Ray finds them where the file says nothing."""
    bootstrapped: dict[str, Any]
    run_instances: dict[str, dict[str, Any]]
    """The RunInstances request by node type."""
    operations: set[str]
    """All EC2 operations that Ray called."""
    to_start_nodes: set[str]
    """Those of them that its node provider called, which runs on the head."""
    instances: list[dict[str, Any]]
    roles: list[Any]
    rules: list[dict[str, Any]]
    """Inbound rules of all security groups in the end."""


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    home = tmp_path_factory.mktemp("home")
    (home / "keys").mkdir()
    (home / "keys" / "cluster").write_text("sixteen bytes or more")
    with aws_account(home) as requests:
        return _launch(_with_ids_of_an_account(_read(request.param), home / "keys"), requests)


def _read(example: Path) -> dict[str, Any]:
    data = yaml_text.parse(example.read_text(), str(example))
    assert isinstance(data, dict)
    return data


def _with_ids_of_an_account(data: dict[str, Any], keys: Path) -> ClusterFile:
    section = data["cluster"]
    ec2 = boto3.client("ec2", section["region"])
    subnets = ec2.describe_subnets()["Subnets"][: len(section["subnets"])]
    group = ec2.create_security_group(GroupName="mesh", Description="mesh", VpcId=subnets[0]["VpcId"])["GroupId"]
    itself = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=itself)
    ec2.authorize_security_group_egress(GroupId=group, IpPermissions=itself)
    boto3.client("iam").create_instance_profile(InstanceProfileName=section["instance_profile"])
    section.update(subnets=[subnet["SubnetId"] for subnet in subnets], security_groups=[group], key_folder=str(keys))
    return load_cluster_file(data)


def _launch(file: ClusterFile, requests: Requests) -> Launched:
    requests.clear()
    rendered = ray_cluster(file)
    config = prepare_config(copy.deepcopy(rendered))
    validate_config(config)
    bare = copy.deepcopy(config)
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    detected = AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
    config = AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(config))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    run_instances, bootstrap = {}, len(requests)
    for name, kind in config["available_node_types"].items():
        before = len(requests)
        provider.create_node(kind["node_config"], _tags(name, name == config["head_node_type"]), 1)
        [run_instances[name]] = [sent for operation, sent in requests[before:] if operation == "RunInstances"]
    operations = {operation for operation, _ in requests}
    ec2 = boto3.client("ec2", file.cluster.region)
    return Launched(
        file,
        rendered,
        detected={name: kind["resources"] for name, kind in detected.items()},
        bootstrapped=config,
        run_instances=run_instances,
        operations=operations,
        to_start_nodes={operation for operation, _ in requests[bootstrap:]},
        instances=[each for found in ec2.describe_instances()["Reservations"] for each in found["Instances"]],
        roles=boto3.client("iam").list_roles()["Roles"],
        rules=[rule for group in ec2.describe_security_groups()["SecurityGroups"] for rule in group["IpPermissions"]],
    )


def _tags(name: str, head: bool) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD if head else NODE_KIND_WORKER,
        TAG_RAY_USER_NODE_TYPE: name,
        TAG_RAY_NODE_NAME: f"ray-{name}",
        TAG_RAY_NODE_STATUS: STATUS_UNINITIALIZED,
        TAG_RAY_LAUNCH_CONFIG: "hash",
    }


def test_every_node_type_starts_as_the_file_says(launched: Launched) -> None:
    cluster = launched.file.cluster
    for node, request in [
        (cluster.head, launched.run_instances["head"]),
        *((pool, launched.run_instances[pool.name]) for pool in cluster.pools),
    ]:
        assert request["InstanceType"] == node.instance_type
        assert request["ImageId"].startswith("resolve:ssm:/aws/service/")
        assert request["IamInstanceProfile"] == {"Name": cluster.instance_profile}
        assert request["MetadataOptions"]["HttpTokens"] == "required"
        assert request["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    assert len(launched.instances) == len(cluster.pools) + 1


def test_pools_are_bought_and_placed_as_the_file_says(launched: Launched) -> None:
    assert "InstanceMarketOptions" not in launched.run_instances["head"]
    for pool in launched.file.cluster.pools:
        request = launched.run_instances[pool.name]
        assert request.get("InstanceMarketOptions", {}).get("MarketType", "on-demand") == pool.market
        assert request.get("Placement", {}).get("GroupName") == pool.placement_group
        target = request.get("CapacityReservationSpecification", {}).get("CapacityReservationTarget", {})
        assert target.get("CapacityReservationId") == pool.capacity_reservation_id


def test_efa_takes_every_network_card_and_one_address(launched: Launched) -> None:
    cluster = launched.file.cluster
    for pool in (pool for pool in cluster.pools if pool.uses_efa):
        request, hardware = launched.run_instances[pool.name], instance_type(pool.instance_type)
        interfaces = request["NetworkInterfaces"]
        assert not {"SubnetId", "SecurityGroupIds"} & set(request)
        assert {tuple(each["Groups"]) for each in interfaces} == {tuple(cluster.security_groups)}
        assert {each["SubnetId"] for each in interfaces} == {cluster.subnets[0]}
        efa = [each["NetworkCardIndex"] for each in interfaces if each["InterfaceType"] == "efa-only"]
        assert sorted(efa) == list(range(hardware.network_cards))
        assert len(efa) == hardware.efa
        plain = [each for each in interfaces if each["InterfaceType"] == "interface"]
        assert [(each["NetworkCardIndex"], each["DeviceIndex"]) for each in plain] == [(0, 0)]
        places = {(each["NetworkCardIndex"], each["DeviceIndex"]) for each in interfaces}
        assert len(places) == len(interfaces)


def test_without_efa_subnets_stay_a_choice(launched: Launched) -> None:
    cluster = launched.file.cluster
    plain = [pool.name for pool in cluster.pools if not pool.uses_efa]
    for request in (launched.run_instances[name] for name in ["head", *plain]):
        assert "NetworkInterfaces" not in request
        assert request["SubnetId"] in cluster.subnets
        assert request["SecurityGroupIds"] == cluster.security_groups


def test_ray_opens_nothing_to_the_world_and_makes_no_role(launched: Launched) -> None:
    assert "RunInstances" in launched.operations
    assert not launched.operations & {"CreateSecurityGroup", "AuthorizeSecurityGroupIngress"}
    assert launched.roles == []
    assert [rule for rule in launched.rules for each in rule["IpRanges"] if each["CidrIp"] == "0.0.0.0/0"] == []


def test_resources_are_what_ray_finds_and_our_slots(launched: Launched) -> None:
    for name, kind in launched.rendered["available_node_types"].items():
        ours = {key: count for key, count in kind["resources"].items() if not key.startswith("expertmesh_")}
        found = {key: n for key, n in launched.detected[name].items() if key in ("CPU", "GPU", "neuron_cores")}
        if kind["node_config"]["InstanceType"].startswith("trn2"):
            assert "neuron_cores" not in found  # Ray 2.58 doesn't know its cores, so the file has to say them
            assert ours.pop("neuron_cores") == 128
        assert ours == found


def test_autoscaler_v2_reads_labels_slots_and_timeouts(launched: Launched) -> None:
    config = AutoscalingConfig(launched.bootstrapped)
    types, cluster = config.get_node_type_configs(), launched.file.cluster
    assert types is not None
    assert config.get_idle_timeout_s() == cluster.idle_timeout_minutes * 60
    for pool in cluster.pools:
        found = types[pool.name]
        assert found.labels["expertmesh.io/side"] == pool.side
        assert found.resources[f"expertmesh_{pool.side}"] >= 1
        assert (found.min_worker_nodes, found.max_worker_nodes) == (pool.min_nodes, pool.max_nodes)
        assert found.idle_timeout_s == (None if pool.idle_timeout_minutes is None else pool.idle_timeout_minutes * 60)


def test_every_pool_runs_its_hardware_image(launched: Launched) -> None:
    """As the autoscaler that starts the containers reads the file."""
    config, cluster = AutoscalingConfig(launched.bootstrapped), launched.file.cluster
    assert config.get_docker_config("head")["image"] == cluster.images.cpu
    for pool in cluster.pools:
        docker = config.get_docker_config(pool.name)
        assert docker["image"] == getattr(cluster.images, pool.accelerator)
        assert "--ulimit memlock=-1:-1" in docker["run_options"]
        assert ("--gpus=all" in docker["worker_run_options"]) == (pool.accelerator == "gpu")
        assert ("--device=/dev/infiniband" in docker["worker_run_options"]) == pool.uses_efa


EFA_TYPES = [row for row in INSTANCE_TYPES.values() if row.efa]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The RunInstances request for a node of each type that has EFA, by type."""
    home = tmp_path_factory.mktemp("home")
    (home / "cluster").write_text("sixteen bytes or more")
    requests: dict[str, dict[str, Any]] = {}
    for mesh, rows in (
        ({"experts": {"mode": "colocated"}, "attention": {"resources": {"neuron_cores": 2}}}, _rows(neuron=True)),
        ({"attention": {"cpus": 1}, "experts": {"shards": 1, "cpus": 1}}, _rows(neuron=False)),
    ):
        with aws_account(home) as seen:
            file = _with_ids_of_an_account({"mesh": mesh, "cluster": _cluster_of(rows)}, home)
            requests |= {
                sent["InstanceType"]: sent
                for name, sent in _launch(file, seen).run_instances.items()
                if name not in ("head", "front")
            }
    return requests


def _rows(neuron: bool) -> list[InstanceType]:
    return [row for row in EFA_TYPES if bool(row.neuron_cores) == neuron]


def _cluster_of(rows: list[InstanceType]) -> dict[str, Any]:
    side = "attention" if rows[0].neuron_cores else "experts"
    pools = [
        {
            "name": row.name.replace(".", "-"),
            "side": side,
            "instance_type": row.name,
            "max_nodes": 1,
            "efa": True,
            **(
                {"market": "capacity-block", "capacity_reservation_id": "cr-1"}
                if row.capacity_blocks
                else {"market": "spot"}
            ),
        }
        for row in rows
    ]
    if side == "experts":
        pools.append({"name": "front", "side": "attention", "instance_type": "m7i.4xlarge", "max_nodes": 1})
    return {
        "region": "us-east-1",
        "subnets": ["subnet-1", "subnet-2"],
        "security_groups": ["sg-1"],
        "instance_profile": "mesh-node",
        "placement_group": "mesh",
        "images": {"cpu": "c", "gpu": "g", "neuron": "n"},
        "pools": pools,
    }


@pytest.mark.parametrize("row", EFA_TYPES, ids=lambda row: row.name)
def test_every_type_with_efa_asks_for_all_of_it(row: InstanceType, started: dict[str, dict[str, Any]]) -> None:
    request = started[row.name]
    kinds = [(each["NetworkCardIndex"], each["InterfaceType"]) for each in request["NetworkInterfaces"]]
    efa = sorted(card for card, kind in kinds if kind in ("efa", "efa-only"))
    assert efa == list(range(row.efa))
    assert [card for card, kind in kinds if kind in ("efa", "interface")] == [0]  # one IP address
    assert request["Placement"] == {"GroupName": "mesh"}


@pytest.mark.parametrize("row", EFA_TYPES, ids=lambda row: row.name)
def test_capacity_blocks_where_they_are_sold_and_spot_elsewhere(
    row: InstanceType, started: dict[str, dict[str, Any]]
) -> None:
    request = started[row.name]
    market = "capacity-block" if row.capacity_blocks else "spot"
    assert request["InstanceMarketOptions"] == {"MarketType": market}
    reservation = {"CapacityReservationTarget": {"CapacityReservationId": "cr-1"}} if row.capacity_blocks else None
    assert request.get("CapacityReservationSpecification") == reservation


def test_the_head_may_call_what_ray_calls_to_start_a_node(launched: Launched) -> None:
    """The template's LaunchPolicy allows every EC2 operation of `create_node`."""
    allowed = {action for statement in statements()["LaunchPolicy"] for action in actions(statement)}
    assert {f"ec2:{operation}" for operation in launched.to_start_nodes} <= allowed
    assert "RunInstances" in launched.to_start_nodes
