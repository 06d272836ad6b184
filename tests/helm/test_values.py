"""values.schema.json: made from values.yaml, and what it says to wrong values."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from expertmesh.errors import ConfigError
from expertmesh.platform.config import config_schema
from expertmesh.platform.render.values_schema import values_schema
from tests.helm.chart import CHART, EXAMPLES, Helm, Refused, example

VALUES = CHART / "values.yaml"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_it_is_what_the_generator_makes() -> None:
    assert values_schema(VALUES.read_text()) == SCHEMA


def test_it_is_a_schema_and_takes_defaults_and_examples() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(yaml.safe_load(VALUES.read_text()))
    for path in EXAMPLES:
        validator.validate(example(path))


def test_it_describes_every_key() -> None:
    def undescribed(node: dict[str, Any], path: str) -> list[str]:
        found = []
        for key, inner in node.get("properties", {}).items():
            name = f"{path}.{key}"
            found += ([] if inner.get("description") else [name]) + undescribed(inner, name)
        return found

    top = {"properties": {key: node for key, node in SCHEMA["properties"].items() if key != "mesh"}}
    assert undescribed(top, "") == []


def test_the_mesh_is_the_configuration() -> None:
    mesh = SCHEMA["$defs"]["mesh"]
    assert set(mesh["properties"]) == set(config_schema()["properties"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a thing\nthing: []\n", "thing: its default doesn't tell its type"),
        ("# a thing\nthing: {}\n", "thing: its default doesn't tell its type"),
        ("# a thing\nthing:\n", "thing: its default doesn't tell its type"),
        ("thing: 1\n", "thing: no description above it"),
        ("# a thing\nthing:\n  inner: 1\n", "thing.inner: no description above it"),
        ("- 1\n", "the values are no mapping"),
    ],
)
def test_the_generator_refuses_what_says_too_little(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        values_schema(text)
    assert str(caught.value).startswith(message)


def test_annotations_add_to_the_default() -> None:
    text = (
        "# How many.\n# @schema {minimum: 1}\nmany: 2\n# Which.\n# @schema {$defs: pair}\npair:\n  # One.\n  one: a\n"
    )
    schema = values_schema(text)
    assert schema["properties"]["many"] == {"description": "How many.", "type": "integer", "minimum": 1}
    assert schema["properties"]["pair"] == {"description": "Which.", "$ref": "#/$defs/pair"}
    assert schema["$defs"]["pair"]["additionalProperties"] is False


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mehs": {}}, ["additional properties 'mehs' not allowed"]),
        ({"mesh": {"experts": {"shards": "two"}}}, ["/mesh/experts/shards", "got string, want integer"]),
        ({"mesh": {"experts": {"shards": 0}}}, ["/mesh/experts/shards", "minimum: got 0, want 1"]),
        ({"mesh": {"experts": {"mode": "both"}}}, ["/mesh/experts/mode", "must be one of 'mesh', 'colocated'"]),
        ({"mesh": {"attention": {"replica": 1}}}, ["/mesh/attention", "'replica' not allowed"]),
        ({"workerGroups": {"attention": {"gpu": 1}}}, ["/workerGroups/attention", "'gpu' not allowed"]),
        ({"workerGroups": {"attention": {"side": "both"}}}, ["/workerGroups/attention/side", "'attention', 'experts'"]),
        (
            {"workerGroups": {"attention": {"memory": "8 GB"}}},
            ["/workerGroups/attention/memory", "does not match pattern"],
        ),
        ({"workerGroups": {"Front": {}}}, ["invalid propertyName 'Front'", "does not match pattern"]),
        ({"ray": {"version": "latest"}}, ["/ray/version", "does not match pattern"]),
        ({"ray": {"upgradeStrategy": {"type": "BlueGreen"}}}, ["/ray/upgradeStrategy/type", "NewCluster"]),
        ({"ingress": {"alb": {"scheme": "public"}}}, ["/ingress/alb/scheme", "'internal', 'internet-facing'"]),
        (
            {"storage": {"existingClaims": [{"claimName": "a"}]}},
            ["/storage/existingClaims/0", "missing property 'mountPath'"],
        ),
        ({"karpenter": {"nodePools": {"a": {}}}}, ["/karpenter/nodePools/a", "missing property 'instanceTypes'"]),
        ({"image": {"pullPolicy": "Sometimes"}}, ["/image/pullPolicy", "'Always', 'IfNotPresent', 'Never'"]),
        ({"fullnameOverride": "n" * 48}, ["/fullnameOverride", "maxLength: got 48, want 47"]),
        ({"commonLabels": {"a": 1}}, ["/commonLabels/a", "got number, want string"]),
    ],
)
def test_wrong_values_are_refused_with_their_place(helm: Helm, values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        helm.template(values)
    message = str(caught.value)
    assert "values don't meet the specifications of the schema" in message
    for word in words:
        assert word in message
