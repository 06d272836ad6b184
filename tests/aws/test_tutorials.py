"""The commands of the tutorials print what the tutorials say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from typer.testing import CliRunner

from expertmesh.platform.cli import app
from tests.aws.conftest import ROOT, aws_account
from tests.aws.moto_types import install
from tests.aws.tutorial import Shown, shown

MESH = ROOT / "examples" / "aws" / "cpu-experts-r7i.yaml"
FROM_THE_STACK = ("name", "region", "subnets", "security_groups", "instance_profile", "fsx")


def _without_ids(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "cluster": {key: value for key, value in data["cluster"].items() if key not in FROM_THE_STACK}}


def test_a_tutorial_that_is_wrong_is_noticed() -> None:
    step = Shown("x", "one\n...\nlast line")
    assert step.agrees_with("one\nlast\nline\n")
    assert step.agrees_with("one\ntwo\nlast line\n")
    assert not step.agrees_with("one\ntwo\n")
    assert not step.agrees_with("two\nlast line\n")


def test_ray_cluster(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own."""
    data = yaml.safe_load(MESH.read_text())
    (tmp_path / "my-mesh.yaml").write_text(yaml.safe_dump(_without_ids(data)))
    (tmp_path / "too-much.yaml").write_text(MESH.read_text().replace("kv_cache_gib: 24", "kv_cache_gib: 40"))
    stack = {"cluster": {key: data["cluster"][key] for key in FROM_THE_STACK}}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack))
    steps = list(shown("ray-cluster.md"))
    assert [step.command.split()[:3] for step in steps] == [["expertmesh", "render", "ray-cluster"]] * 2
    for step in steps:
        words = [str(Path(sys.executable).with_name("expertmesh")), *step.command.split()[1:]]
        done = subprocess.run(
            words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert step.agrees_with(done.stdout), done.stdout


def _ids_shortened(text: str) -> str:
    return re.sub(r"\b(bucket|sg|HeadProfile)-\w+", r"\1-ID", text)


def test_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-mesh.yaml").write_text(yaml.safe_dump(_without_ids(yaml.safe_load(MESH.read_text()))))
    steps = list(shown("aws.md"))
    assert [step.command.split()[1:3] for step in steps] == [
        ["aws", "plan"],
        ["aws", "up"],
        ["render", "ray-cluster"],
        ["aws", "status"],
        ["aws", "down"],
    ]
    with aws_account(tmp_path):
        subnets = boto3.client("ec2").describe_subnets()["Subnets"][:2]
        settings = yaml.safe_load((ROOT / "examples" / "aws" / "infrastructure" / "cpu.yaml").read_text())
        settings.update(vpc=subnets[0]["VpcId"], subnets=[subnet["SubnetId"] for subnet in subnets])
        (tmp_path / "infrastructure.yaml").write_text(yaml.safe_dump(settings))
        for step in steps:
            printed = CliRunner().invoke(app, step.command.split()[1:], input="y\n").output
            short = Shown(step.command, _ids_shortened(step.output))
            assert short.agrees_with(_ids_shortened(printed)), printed
