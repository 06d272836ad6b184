"""One stack with every option, made on moto: what is in it, and what render and Helm take from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import jsonschema
import pytest

from expertmesh.platform.aws import Event, Infrastructure, StackState, cluster_sections, helm_values
from expertmesh.platform.render import load_cluster_file, ray_cluster
from tests.aws.conftest import ROOT, aws_account
from tests.aws.moto_types import install
from tests.aws.stacks import EVERYTHING, new_stack
from tests.aws.template import template

MESH_FILE: dict[str, Any] = {
    "mesh": {"model": {"source": "/fsx/models/moe"}, "attention": {"gpus": 1, "cpus": 8}},
    "cluster": {
        "images": {"cpu": "mesh:cpu", "gpu": "mesh:gpu"},
        "pools": [
            {"name": "front", "side": "attention", "instance_type": "p5en.48xlarge", "max_nodes": 1},
            {"name": "back", "side": "experts", "instance_type": "r7i.8xlarge", "max_nodes": 1},
        ],
    },
}


@dataclass
class Made:
    """The stack after `execute`."""

    settings: Infrastructure
    state: StackState
    events: list[Event]

    @property
    def outputs(self) -> dict[str, str]:
        return self.state.outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    install()
    with aws_account(tmp_path_factory.mktemp("home")):
        stack = new_stack(**EVERYTHING)
        events: list[Event] = []
        state = stack.execute(stack.plan(), events.append)
        yield Made(stack.settings, state, events)


def test_every_step_is_told(made: Made) -> None:
    assert [event.status for event in made.events] == ["CREATE_IN_PROGRESS", "CREATE_COMPLETE"]
    assert made.state.status == "CREATE_COMPLETE"


def test_every_output_is_there(made: Made) -> None:
    assert set(made.outputs) == set(template()["Outputs"]) - {"ValkeyPasswordSecret"}  # of the other login
    assert all(made.outputs.values())


def test_the_cache(made: Made) -> None:
    client = boto3.client("elasticache")
    [cache] = client.describe_replication_groups()["ReplicationGroups"]
    assert (cache["ClusterEnabled"], cache["TransitEncryptionEnabled"], len(cache["NodeGroups"])) == (True, True, 2)
    assert cache["ReplicationGroupId"] == made.outputs["ValkeyName"]
    [user] = [each for each in client.describe_users()["Users"] if each["UserId"] != "default"]
    assert (user["UserId"], user["Authentication"]["Type"]) == (made.outputs["ValkeyUser"], "iam")


def test_the_file_system(made: Made) -> None:
    [files] = boto3.client("fsx").describe_file_systems()["FileSystems"]
    assert (files["StorageCapacity"], files["LustreConfiguration"]["DeploymentType"]) == (4800, "PERSISTENT_2")
    assert files["SubnetIds"] == made.settings.subnets[:1]


def test_hyperpod(made: Made) -> None:
    cluster = boto3.client("sagemaker").describe_cluster(ClusterName="mesh")
    assert [group["TargetCount"] for group in cluster["InstanceGroups"]] == [2]
    assert cluster["VpcConfig"]["SecurityGroupIds"] == [made.outputs["NodeSecurityGroupId"], "sg-1"]


def test_the_nodes_group_lets_in_itself_and_the_clients(made: Made) -> None:
    nodes = made.outputs["NodeSecurityGroupId"]
    [group] = boto3.client("ec2").describe_security_groups(GroupIds=[nodes])["SecurityGroups"]
    itself = [
        {pair["GroupId"] for pair in rule["UserIdGroupPairs"]}
        for side in ("IpPermissions", "IpPermissionsEgress")
        for rule in group[side]
        if rule["IpProtocol"] == "-1" and rule["UserIdGroupPairs"]
    ]
    assert itself == [{nodes}, {nodes}]
    assert [entry["CidrIp"] for rule in group["IpPermissions"] for entry in rule["IpRanges"]] == ["10.0.0.0/16"]


def test_a_cluster_file_without_ids_renders_on_top_of_a_stack(made: Made) -> None:
    outputs = made.outputs
    rendered = ray_cluster(load_cluster_file(MESH_FILE, cluster_sections(made.settings, outputs)))
    nodes = {name: kind["node_config"] for name, kind in rendered["available_node_types"].items()}
    assert nodes["head"]["IamInstanceProfile"] == {"Name": outputs["HeadInstanceProfile"]}
    assert nodes["front"]["IamInstanceProfile"] == {"Name": outputs["WorkerInstanceProfile"]}
    assert nodes["front"]["Placement"] == {"GroupName": outputs["PlacementGroupName"]}
    assert "Placement" not in nodes["back"]  # no EFA
    assert nodes["back"]["SecurityGroupIds"] == [outputs["NodeSecurityGroupId"]]
    assert nodes["back"]["SubnetIds"] == made.settings.subnets
    assert any(outputs["FsxDnsName"] in command for command in rendered["initialization_commands"])
    assert rendered["cluster_name"] == made.settings.ray_cluster


def test_the_store_is_the_stacks_cache(made: Made) -> None:
    file = load_cluster_file(MESH_FILE, cluster_sections(made.settings, made.outputs))
    store = file.mesh.kv_store
    assert store.url == f"rediss://{made.outputs['ValkeyAddress']}?cluster=true"
    assert store.username == made.outputs["ValkeyUser"]
    assert store.iam is not None
    assert (store.iam.cache_name, store.iam.region) == (made.outputs["ValkeyName"], "us-east-1")


def test_a_password_is_a_file_beside_the_clusters_secret(made: Made) -> None:
    outputs = {**made.outputs, "ValkeyPasswordSecret": "arn:secret"}
    store = load_cluster_file(MESH_FILE, cluster_sections(made.settings, outputs)).mesh.kv_store
    assert store.iam is None
    assert str(store.password_file) == "~/expertmesh-keys/valkey"
    assert "password_file" not in helm_values(made.settings, outputs)["mesh"]["kv_store"]


def test_what_the_file_says_wins(made: Made) -> None:
    own = {**MESH_FILE, "cluster": {**MESH_FILE["cluster"], "security_groups": ["sg-own"], "name": "own"}}
    cluster = load_cluster_file(own, cluster_sections(made.settings, made.outputs)).cluster
    assert (cluster.name, cluster.security_groups) == ("own", ["sg-own"])
    assert cluster.subnets == made.settings.subnets


def _valid(values: dict[str, Any]) -> dict[str, Any]:
    schema = json.loads((ROOT / "helm" / "expertmesh" / "values.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(values)
    return values


def test_helm_values_are_values_of_the_chart(made: Made) -> None:
    values = _valid(helm_values(made.settings, made.outputs))
    assert values["storage"]["fsx"]["fileSystemId"] == made.outputs["FsxFileSystemId"]
    assert values["hyperpod"] == {"enabled": True}


def test_without_a_file_system_helm_mounts_the_bucket(made: Made) -> None:
    settings = made.settings.model_copy(update={"fsx": None, "hyperpod": None})
    bucket = {"enabled": True, "bucket": "checkpoints", "region": "us-east-1", "prefix": "models/"}
    assert _valid(helm_values(settings, {"BucketName": "checkpoints"})) == {"storage": {"s3": bucket}}
