"""The CloudFormation template as data."""

from __future__ import annotations

from typing import Any

import yaml

from expertmesh.platform.aws.stack import TEMPLATE
from tests.aws.conftest import ROOT

INFRASTRUCTURE = sorted((ROOT / "examples" / "aws" / "infrastructure").glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """Reads `!Ref X` as {"Ref": X} and `!Sub X` as {"Fn::Sub": X}."""


def _long_form(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    match node:
        case yaml.ScalarNode():
            value = loader.construct_scalar(node)
        case yaml.SequenceNode():
            value = loader.construct_sequence(node, deep=True)
        case _:
            raise AssertionError(f"!{suffix} of a mapping")
    return {suffix if suffix == "Ref" else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _long_form)


def template() -> dict[str, Any]:
    """The whole template, functions in their long form."""
    data: dict[str, Any] = yaml.load(TEMPLATE.read_text(encoding="utf-8"), Loader=_Loader)  # derives from SafeLoader
    return data


def resources(kind: str) -> dict[str, dict[str, Any]]:
    """Properties of the template's resources of a type, by name."""
    found = template()["Resources"].items()
    return {name: each["Properties"] for name, each in found if each["Type"] == kind}


def statements() -> dict[str, list[dict[str, Any]]]:
    """Statements of every policy that allows something, by the resource that holds it."""
    found = {name: each["PolicyDocument"]["Statement"] for name, each in resources("AWS::IAM::ManagedPolicy").items()}
    for name, role in resources("AWS::IAM::Role").items():
        for policy in role.get("Policies", []):
            found[name] = policy["PolicyDocument"]["Statement"]
    return found


def actions(statement: dict[str, Any]) -> list[str]:
    """What a statement is about."""
    found = statement["Action"]
    return [found] if isinstance(found, str) else list(found)
