"""From the chart's annotated values to its JSON schema.

    python -m expertmesh.platform.render.values_schema > helm/expertmesh/values.schema.json

A key's type is that of its default, and a section takes no other keys than those it has. The comment above a key is its
description; a line `# @schema {...}` in it (YAML) adds what the default can't say. There, `$ref` names one of the
DEFINITIONS below, and `$defs` gives the section a name for others to refer to. What has neither a telling default nor
an annotation is an error. The schema of `mesh` is the configuration's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from expertmesh.errors import ConfigError
from expertmesh.platform.config import config_schema

VALUES = Path("helm/expertmesh/values.yaml")
_MARK = "@schema"

DEFINITIONS: Mapping[str, Any] = {
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantity": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kKMGTPE]i?)?$"},
    "env": {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "value": {"type": "string"}, "valueFrom": {"type": "object"}},
            "additionalProperties": False,
        },
    },
    "resources": {
        "type": "object",
        "properties": {
            kind: {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
            for kind in ("requests", "limits")
        },
        "additionalProperties": False,
    },
    "claim": {
        "type": "object",
        "required": ["claimName", "mountPath"],
        "properties": {
            "claimName": {"type": "string", "minLength": 1},
            "mountPath": {"type": "string", "pattern": "^/"},
            "readOnly": {"type": "boolean"},
        },
        "additionalProperties": False,
    },
    "nodePool": {
        "type": "object",
        "required": ["instanceTypes"],
        "properties": {
            "instanceTypes": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "capacityTypes": {
                "type": "array",
                "items": {"enum": ["on-demand", "spot", "reserved"]},
                "minItems": 1,
                "description": "reserved: what karpenter.nodeClass.capacityReservationIds names.",
            },
            "zones": {"type": "array", "items": {"type": "string"}},
            "labels": {"$ref": "#/$defs/labels"},
            "taints": {"type": "array", "items": {"type": "object"}},
            "limits": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
            "weight": {"type": "integer", "minimum": 1, "maximum": 100},
            "consolidateAfter": {"type": "string", "pattern": "^(([0-9]+(s|m|h))+|Never)$"},
            "expireAfter": {"type": "string", "pattern": "^(([0-9]+(s|m|h))+|Never)$"},
        },
        "additionalProperties": False,
    },
}


def values_schema(text: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a values file with annotations.

    Raises ConfigError that names the key which neither its default nor an annotation describes.
    """
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("the values are no mapping")
    definitions = dict(DEFINITIONS)
    schema = _section(root, lines, "", definitions)
    mesh = config_schema()
    definitions |= mesh.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the ExpertMesh chart",
        **schema,
        "properties": {**schema["properties"], "global": {"type": "object", "description": "Helm's own."}},
        "$defs": {**definitions, "mesh": mesh},
    }


def _section(node: yaml.MappingNode, lines: Sequence[str], path: str, definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for key, value in node.value:
        name = f"{path}.{key.value}".lstrip(".")
        properties[key.value] = _property(key, value, lines, name, definitions)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _property(
    key: yaml.Node, value: yaml.Node, lines: Sequence[str], name: str, definitions: dict[str, Any]
) -> dict[str, Any]:
    description, annotation = _comment(lines, key.start_mark.line, name)
    own_name = annotation.pop("$defs", None)
    schema = {**_of_default(value, annotation, lines, name, definitions), **_referring(annotation)}
    if own_name is not None:
        definitions[own_name] = schema
        schema = {"$ref": f"#/$defs/{own_name}"}
    return {"description": description, **schema}


def _of_default(
    value: yaml.Node, annotation: Mapping[str, Any], lines: Sequence[str], name: str, definitions: dict[str, Any]
) -> dict[str, Any]:
    if "$ref" in annotation or "type" in annotation:
        return {}
    match value:
        case yaml.MappingNode() if "additionalProperties" in annotation:
            return {"type": "object"}
        case yaml.MappingNode(value=[_, *_]):
            return _section(value, lines, name, definitions)
        case yaml.SequenceNode() if "items" in annotation:
            return {"type": "array"}
        case yaml.ScalarNode() if value.tag.rpartition(":")[2] in _SCALARS:
            return {"type": _SCALARS[value.tag.rpartition(":")[2]]}
    raise ConfigError(f"{name}: its default doesn't tell its type; add `# {_MARK} {{...}}` above it")


_SCALARS = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _comment(lines: Sequence[str], line: int, name: str) -> tuple[str, dict[str, Any]]:
    """Description and annotation in the comment lines right above `line`."""
    words: list[str] = []
    annotation: dict[str, Any] = {}
    for text in _above(lines, line):
        if text.startswith(_MARK):
            annotation |= yaml.safe_load(text.removeprefix(_MARK))
        else:
            words.append(text)
    if not words:
        raise ConfigError(f"{name}: no description above it")
    return " ".join(words), annotation


def _above(lines: Sequence[str], line: int) -> Iterator[str]:
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return (text.strip().lstrip("#").strip() for text in lines[first:line])


def _referring(node: Any) -> Any:
    """`node` with `$ref: name` written out as a pointer."""
    match node:
        case dict():
            return {
                key: f"#/$defs/{value}" if key == "$ref" and isinstance(value, str) else _referring(value)
                for key, value in node.items()
            }
        case list():
            return [_referring(item) for item in node]
    return node


if __name__ == "__main__":
    json.dump(values_schema(VALUES.read_text(encoding="utf-8")), sys.stdout, indent=2)
    sys.stdout.write("\n")
