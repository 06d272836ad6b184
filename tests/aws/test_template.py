"""What the template says: no lint, least privilege, no door to the world, a cache that our client can use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import redis

from benchmarks.timing import free_port
from expertmesh.kv_store import Endpoint, StoreClient, StoreSettings
from expertmesh.platform.aws import Infrastructure, load_infrastructure
from expertmesh.platform.aws.stack import MAX_TEMPLATE_BYTES, TEMPLATE
from tests.aws.template import INFRASTRUCTURE, actions, resources, statements, template
from tests.kv_store.servers import command, plain_server, until

EVERYTHING = Infrastructure.model_validate(
    {
        "name": "mesh",
        "region": "us-east-1",
        "vpc": "vpc-1",
        "subnets": ["subnet-1", "subnet-2"],
        "bucket": "mesh-checkpoints",
        "clients": "10.0.0.0/16",
        "ssh": "10.1.0.0/16",
        "placement_group": True,
        "fsx": {"storage_gib": 2400, "throughput": 1000},
        "valkey": {"node_type": "cache.r7g.large", "shards": 2, "replicas": 1},
        "hyperpod": {
            "eks_cluster": "arn:aws:eks:us-east-1:111122223333:cluster/mesh",
            "eks_security_group": "sg-1",
            "instance_type": "ml.p5en.48xlarge",
            "instances": 2,
            "lifecycle": "s3://sagemaker-111122223333/hyperpod",
        },
    }
)


def test_no_lint() -> None:
    lint = [str(Path(sys.executable).with_name("cfn-lint")), "--regions", "us-east-1", "us-west-2", "--", str(TEMPLATE)]
    done = subprocess.run(lint, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_fits_into_a_request() -> None:
    assert len(TEMPLATE.read_bytes()) <= MAX_TEMPLATE_BYTES


def test_every_parameter_is_set_by_the_settings_and_fits() -> None:
    given, declared = EVERYTHING.parameters(), template()["Parameters"]
    assert set(given) == set(declared)
    for name, value in given.items():
        assert re.fullmatch(declared[name].get("AllowedPattern", ".*"), value), name
        assert value in declared[name].get("AllowedValues", [value]), name


def test_what_is_not_wanted_has_a_default_that_means_none() -> None:
    bare = {"name": "mesh", "region": "us-east-1", "vpc": "vpc-1", "subnets": ["subnet-1"]}
    given = Infrastructure.model_validate(bare).parameters()
    declared = template()["Parameters"]
    assert {name for name, each in declared.items() if "Default" not in each} <= set(given)
    assert not {"FsxStorageGib", "ValkeyNodeType", "HyperPodEksClusterArn", "UsePlacementGroup"} & set(given)


@pytest.mark.parametrize("example", INFRASTRUCTURE, ids=lambda path: path.stem)
def test_examples_are_valid(example: Path) -> None:
    assert load_infrastructure(example).parameters()["RayClusterName"]


def test_botocore_knows_hyperpods_instance_types() -> None:
    known = botocore.session.get_session().get_service_model("sagemaker").shape_for("ClusterInstanceType").enum
    wanted = [found.hyperpod for found in map(load_infrastructure, INFRASTRUCTURE) if found.hyperpod is not None]
    assert wanted
    assert {each.instance_type for each in wanted} <= set(known)


def test_efa_has_its_self_rule_both_ways() -> None:
    node = {"Fn::GetAtt": "NodeSecurityGroup.GroupId"}
    rules_in = resources("AWS::EC2::SecurityGroupIngress")["NodesFromNodes"]
    rules_out = resources("AWS::EC2::SecurityGroupEgress")["NodesToNodes"]
    assert (rules_in["GroupId"], rules_in["SourceSecurityGroupId"], rules_in["IpProtocol"]) == (node, node, "-1")
    assert (rules_out["GroupId"], rules_out["DestinationSecurityGroupId"], rules_out["IpProtocol"]) == (
        node,
        node,
        "-1",
    )


def test_the_world_gets_in_nowhere() -> None:
    inbound = list(resources("AWS::EC2::SecurityGroupIngress").values())
    for group in resources("AWS::EC2::SecurityGroup").values():
        inbound += group.get("SecurityGroupIngress", [])
    assert len(inbound) >= 8
    assert "0.0.0.0/0" not in str(inbound)
    assert [rule["CidrIp"] for rule in inbound if "CidrIp" in rule] == [{"Ref": "ClientCidr"}, {"Ref": "SshCidr"}]


def test_the_bucket_is_private_encrypted_and_outlives_the_stack() -> None:
    bucket = template()["Resources"]["Bucket"]
    assert (bucket["DeletionPolicy"], bucket["UpdateReplacePolicy"]) == ("Retain", "Retain")
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}
    [statement] = resources("AWS::S3::BucketPolicy")["BucketPolicy"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})


def test_the_cache_speaks_tls_only_and_knows_one_user() -> None:
    [cache] = resources("AWS::ElastiCache::ReplicationGroup").values()
    assert (cache["TransitEncryptionEnabled"], cache["TransitEncryptionMode"]) == (True, "required")
    assert cache["AtRestEncryptionEnabled"] is True
    assert cache["UserGroupIds"] == [{"Ref": "CacheUsers"}]


def test_only_describing_and_ecrs_login_are_allowed_on_everything() -> None:
    wide = {
        action
        for name, found in statements().items()
        if name != "HyperPodRole"  # AWS's documentation asks for these on *
        for statement in found
        if statement["Resource"] == "*"
        for action in actions(statement)
    }
    assert wide == {"ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ecr:GetAuthorizationToken"}


def test_no_policy_has_a_wildcard_action() -> None:
    found = [action for each in statements().values() for statement in each for action in actions(statement)]
    assert len(found) > 20
    assert not [action for action in found if "*" in action]


def test_the_head_starts_and_ends_only_instances_of_its_cluster() -> None:
    cluster = {"Ref": "RayClusterName"}
    launch = {statement["Sid"]: statement for statement in statements()["LaunchPolicy"]}
    start, end = launch["StartInstancesOfThisCluster"], launch["TagAndEndInstancesOfThisCluster"]
    assert start["Condition"] == {"StringEquals": {"aws:RequestTag/ray-cluster-name": cluster}}
    assert end["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster}}
    unconditional = [statement for statement in launch.values() if "Condition" not in statement]
    assert not [each for each in unconditional if "instance/*" in str(each["Resource"])]
    assert launch["GiveWorkersTheirRole"]["Resource"] == {"Fn::GetAtt": "WorkerRole.Arn"}


def _policies(role: str) -> set[str]:
    own = {arn["Ref"] for arn in resources("AWS::IAM::Role")[role]["ManagedPolicyArns"] if "Ref" in arn}
    given = resources("AWS::IAM::ManagedPolicy").items()
    return own | {name for name, policy in given if {"Ref": role} in policy.get("Roles", [])}


def test_only_the_head_starts_instances_and_pods_pull_nothing_themselves() -> None:
    """moto leaves a role's ManagedPolicyArns out, so this is read from the template."""
    login = {"CacheLoginPolicy", "CachePasswordPolicy"}  # either, by condition
    assert _policies("PodRole") == {"CheckpointPolicy", *login}
    assert _policies("WorkerRole") == {"CheckpointPolicy", "PullPolicy", *login}
    assert _policies("HeadRole") == {*_policies("WorkerRole"), "LaunchPolicy"}


def _users() -> dict[str, dict[str, Any]]:
    return resources("AWS::ElastiCache::User")


def test_both_logins_may_do_the_same() -> None:
    assert len({user["AccessString"] for user in _users().values()}) == 1


def test_our_client_works_as_the_caches_user_and_may_do_no_more(tmp_path: Path) -> None:
    """On a real Valkey in cluster mode, with the template's access string."""
    access = _users()["CacheIamUser"]["AccessString"]
    port = free_port()
    server = plain_server(tmp_path / "valkey", port, **{"cluster-enabled": "yes"})
    server.start()
    try:
        command(port, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: b"cluster_state:ok" in command(port, "CLUSTER", "INFO"), "cluster ok")
        command(port, "ACL", "SETUSER", "mesh", ">word", *access.split())
        settings = StoreSettings(Endpoint("127.0.0.1", port), username="mesh", password="word", cluster=True)
        client = StoreClient(settings)
        try:
            got = bytearray(3)
            assert client.set([(b"xm1:a", [memoryview(b"abc")])], ttl_s=60, timeout_s=30) == [3]
            assert client.get([(b"xm1:a", [memoryview(got)])], timeout_s=30) == [3]
            assert client.exists([b"xm1:a", b"xm1:b"], timeout_s=30) == [1, None]
            assert got == b"abc"
        finally:
            client.close()
        login = {"username": "mesh", "password": "word"}
        assert command(port, "SCAN", 0, **login)
        assert command(port, "INFO", **login)
        assert command(port, "UNLINK", "xm1:a", **login) == 1
        for words in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("GET", "other"), ("SET", "other", "1")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                command(port, *words, **login)
    finally:
        server.kill()
