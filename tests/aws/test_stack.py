"""The stack's life on moto: planned, made, changed, ended, by hand and by command; and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.stub import Stubber
from typer.testing import CliRunner

from expertmesh.errors import ConfigError
from expertmesh.platform.aws import (
    AwsError,
    Event,
    Infrastructure,
    Plan,
    Stack,
    load_infrastructure,
)
from expertmesh.platform.cli import app
from expertmesh.platform.config import yaml_text
from tests.aws.conftest import aws_account
from tests.aws.moto_types import install
from tests.aws.stacks import EVERYTHING, HYPERPOD, infrastructure, new_stack
from tests.aws.template import template


@pytest.fixture(autouse=True)
def _account(tmp_path: Path) -> Iterator[None]:
    install()
    with aws_account(tmp_path):
        yield


def _up(stack: Stack) -> Plan:
    plan = stack.plan()
    stack.execute(plan, lambda _: None)
    return plan


class TestLife:
    def test_a_plan_that_is_discarded_leaves_nothing(self) -> None:
        stack = new_stack(**EVERYTHING)
        plan = stack.plan()
        assert plan.creates
        assert {change.action for change in plan.changes} == {"Add"}
        assert {change.resource for change in plan.changes} == set(template()["Resources"])
        stack.discard(plan)
        assert stack.state() is None
        summaries = boto3.client("cloudformation").list_stacks()["StackSummaries"]
        assert {each["StackStatus"] for each in summaries} == {"DELETE_COMPLETE"}

    def test_without_options_there_is_the_least(self) -> None:
        stack = new_stack()
        state = stack.execute(stack.plan(), lambda _: None)
        kinds = {resource.kind.split("::")[1] for resource in state.resources if resource.kind}
        assert kinds == {"S3", "IAM", "EC2"}
        assert not [name for name in state.outputs if name.startswith(("Fsx", "Valkey", "HyperPod", "Placement"))]

    def test_a_password_login_makes_a_secret_and_no_iam_user(self) -> None:
        stack = new_stack(valkey={"node_type": "cache.r7g.large", "login": "password"})
        outputs = stack.execute(stack.plan(), lambda _: None).outputs
        secret = boto3.client("secretsmanager").get_secret_value(SecretId=outputs["ValkeyPasswordSecret"])
        assert len(secret["SecretString"]) == 64
        users = boto3.client("elasticache").describe_users()["Users"]
        assert {user["Authentication"]["Type"] for user in users if user["UserId"] == "mesh-mesh"} == {"password"}

    def test_the_same_again_is_nothing_to_change(self) -> None:
        _up(new_stack())
        plan = new_stack().plan()
        assert plan == Plan(creates=False, changes=(), change_set=None)
        with pytest.raises(ValueError, match="without changes"):
            new_stack().execute(plan, lambda _: None)

    def test_a_change_is_an_update(self) -> None:
        _up(new_stack())
        stack = new_stack(ssh="10.1.0.0/16")
        plan = stack.plan()
        assert not plan.creates
        state = stack.execute(plan, lambda _: None)
        assert state.status == "UPDATE_COMPLETE"

    def test_down_leaves_the_bucket_only(self) -> None:
        stack = new_stack(**EVERYTHING)
        outputs = stack.execute(stack.plan(), lambda _: None).outputs
        stack.delete(lambda _: None)
        assert stack.state() is None
        assert [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]] == [outputs["BucketName"]]
        assert boto3.client("iam").list_roles()["Roles"] == []
        stack.delete(lambda _: None)  # what isn't there can be deleted again


class TestCommand:
    """The command line, start to end, as a user runs it."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "infrastructure.yaml"
        path.write_text(yaml_text.dump(infrastructure(fsx={"storage_gib": 1200})))
        return path

    def run(self, *words: object, answer: str | None = None, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["aws", *map(str, words)], input=answer)
        assert done.exit_code == code, done.output
        return done.output

    def test_plan_up_status_down(self, file: Path, tmp_path: Path) -> None:
        assert self.run("status", file, code=3) == "stack mesh in us-east-1: not there\n"
        planned = self.run("plan", file)
        assert planned.startswith("stack mesh in us-east-1 is made:\n")
        assert "  + FileSystem           AWS::FSx::FileSystem\n" in planned
        assert self.run("status", file, code=3)

        written, values = tmp_path / "stack.yaml", tmp_path / "values.yaml"
        made = self.run("up", file, "--yes", "--write", written, "--write-helm", values)
        assert "stack mesh in us-east-1: CREATE_COMPLETE" in made
        assert f"wrote {written}" in made
        assert set(yaml_text.parse(written.read_text(), "stack")["cluster"]) >= {"subnets", "fsx"}  # type: ignore[index,call-overload]
        assert "fsx:" in values.read_text()
        assert "nothing to change" in self.run("up", file)
        assert "BucketPolicy         AWS::S3::BucketPolicy" in self.run("status", file)

        ended = self.run("down", file, "--yes")
        assert "Bucket               AWS::S3::Bucket (stays)" in ended
        assert ended.splitlines()[-1].startswith("what stays: s3://mesh-bucket-")
        assert self.run("down", file) == "stack mesh in us-east-1: not there\n"

    def test_without_a_yes_nothing_happens(self, file: Path) -> None:
        assert "make these changes?" in self.run("up", file, answer="n\n", code=1)
        assert "make these changes?" in self.run("up", file, answer="", code=1)
        assert self.run("status", file, code=3)
        self.run("up", file, answer="y\n")
        assert "delete stack mesh in us-east-1?" in self.run("down", file, answer="n\n", code=1)
        self.run("status", file)


class TestWhatGoesWrong:
    """moto neither fails nor takes its time: here botocore's stubber answers as CloudFormation does."""

    def stubbed(self) -> tuple[Stack, Stubber]:
        stack = new_stack()
        return stack, Stubber(stack._aws)

    def describe(self, stub: Stubber, status: str) -> None:
        described = {"StackName": "mesh", "StackId": "arn:mesh", "CreationTime": 0, "StackStatus": status}
        stub.add_response("describe_stacks", {"Stacks": [described]})

    def events(self, stub: Stubber, *events: tuple[str, str, str]) -> None:
        answer = [
            {
                "StackId": "arn:mesh",
                "StackName": "mesh",
                "EventId": f"{resource}-{status}",
                "Timestamp": 0,
                "LogicalResourceId": resource,
                "ResourceType": "AWS::FSx::FileSystem",
                "ResourceStatus": status,
                "ResourceStatusReason": reason,
            }
            for resource, status, reason in events
        ]
        stub.add_response("describe_stack_events", {"StackEvents": answer})

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            ("ROLLBACK_COMPLETE", "can't be changed; delete it first: expertmesh aws down"),
            ("UPDATE_IN_PROGRESS", "wait until CloudFormation has ended that"),
        ],
    )
    def test_a_stack_that_cannot_be_changed_now(self, status: str, words: str) -> None:
        stack, stub = self.stubbed()
        with stub:
            self.describe(stub, status)
            with pytest.raises(AwsError, match=words):
                stack.plan()

    def test_a_change_set_that_fails_says_why_and_is_removed(self) -> None:
        stack, stub = self.stubbed()
        with stub:
            self.describe(stub, "CREATE_COMPLETE")
            stub.add_response("create_change_set", {"Id": "arn:set"})
            stub.add_response("describe_change_set", {"Status": "CREATE_IN_PROGRESS"})
            stub.add_response("describe_change_set", {"Status": "FAILED", "StatusReason": "Parameters: [X] must exist"})
            stub.add_response("delete_change_set", {})
            with pytest.raises(AwsError, match=r"can't be changed to this: Parameters: \[X\] must exist"):
                stack.plan()
            stub.assert_no_pending_responses()

    def test_a_rollback_names_the_first_cause_and_not_what_was_cancelled(self) -> None:
        stack, stub = self.stubbed()
        told: list[Event] = []
        before = ("mesh", "CREATE_COMPLETE", "long ago")
        failed = ("FileSystem", "CREATE_FAILED", "no capacity")
        cancelled = ("Cache", "CREATE_FAILED", "Resource creation cancelled")
        with stub:
            self.describe(stub, "CREATE_COMPLETE")
            self.events(stub, before)
            stub.add_response("execute_change_set", {})
            self.describe(stub, "UPDATE_ROLLBACK_IN_PROGRESS")
            self.events(stub, failed, before)
            self.describe(stub, "UPDATE_ROLLBACK_COMPLETE")
            self.events(stub, cancelled, failed, before)
            with pytest.raises(AwsError) as caught:
                stack.execute(Plan(False, (), "arn:set"), told.append)
        assert str(caught.value).splitlines() == [
            "stack mesh ended as UPDATE_ROLLBACK_COMPLETE",
            "FileSystem (AWS::FSx::FileSystem): no capacity",
        ]
        assert [event.resource for event in told] == ["FileSystem", "Cache"]

    def test_refused_by_aws(self) -> None:
        stack, stub = self.stubbed()
        with stub:
            stub.add_client_error("describe_stacks", "AccessDenied", "User mesh is not authorized")
            with pytest.raises(AwsError, match="stack mesh: AccessDenied: User mesh is not authorized"):
                stack.state()

    def test_no_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.DEFAULT_SESSION = None
        with pytest.raises(AwsError, match=r"no AWS credentials; set AWS_PROFILE"):
            Stack(
                Infrastructure.model_validate(
                    {"name": "mesh", "region": "us-east-1", "vpc": "vpc-1", "subnets": ["subnet-1"]}
                )
            ).state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Mesh"}, "name: 'Mesh' is not of the form my-mesh"),
        ({"vpc": "mine"}, "vpc: 'mine' is not of the form vpc-0a1b2c3d"),
        ({"subnets": []}, "subnets: "),
        ({"clients": "0.0.0.0/0"}, "clients: 0.0.0.0/0 is the whole internet"),
        ({"ssh": "10.0.0.1/8"}, "ssh: '10.0.0.1/8' is not an IPv4 network"),
        ({"fsx": {"storage_gib": 3000}}, "fsx.storage_gib: 3000 is not a size of FSx for Lustre"),
        ({"fsx": {"storage_gib": 1200, "throughput": 300}}, "fsx.throughput: 300 is not one of 125, 250, 500, 1000"),
        ({"valkey": {"node_type": "r7g.large"}}, "valkey.node_type: 'r7g.large' is not of the form cache.r7g.2xlarge"),
        ({"valkey": {"node_type": "cache.r7g.large", "replicas": 1}}, "valkey: replicas go into other zones"),
        ({"hyperpod": {**HYPERPOD, "instance_type": "ml.p9.48xlarge"}}, "'p9.48xlarge' is not in the hardware table"),
        ({"hyperpod": {**HYPERPOD, "lifecycle": "s3://own/x"}}, "hyperpod.lifecycle: 's3://own/x' is not of the form"),
        ({"fxs": {}}, "fxs: unknown key; did you mean 'fsx'"),
        ({"password": "x"}, "password: a secret does not belong"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    bare = {"name": "mesh", "region": "us-east-1", "vpc": "vpc-1", "subnets": ["subnet-1"]}
    with pytest.raises(ConfigError) as caught:
        load_infrastructure({**bare, **change})
    assert message in str(caught.value)
