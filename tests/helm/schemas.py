"""What an API server would refuse: Kubernetes' own schemas, those of KubeRay and Karpenter, and their CEL rules."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
from celpy import celtypes

from tests.helm.chart import ROOT, Object

KUBERNETES = "1.33"
FOLDER = Path(os.environ.get("EXPERTMESH_SHARED_DATA") or ROOT.parent / "shared" / "data") / "schemas"
MISSING = None if FOLDER.is_dir() else f"no schemas of custom resources in {FOLDER} (EXPERTMESH_SHARED_DATA)"
_MONITORING = "monitoring.coreos.com"
"""Its schemas are not in FOLDER; the unit suite looks at these objects itself."""


def problems(item: Object) -> list[str]:
    """What is wrong with `item`; empty if an API server would take it."""
    group = item["apiVersion"].rpartition("/")[0]
    if group == _MONITORING:
        return []
    schema = _custom(item["kind"], item["apiVersion"].rpartition("/")[2])
    if schema is not None:
        found = [
            f"{error.json_path}: {error.message[:200]}"
            for error in jsonschema.Draft7Validator(schema).iter_errors(item)
        ]
        return found + list(_broken_rules(schema, item, "$"))
    try:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


@functools.cache
def _custom(kind: str, version: str) -> Mapping[str, Any] | None:
    path = FOLDER / f"{kind.lower()}_{version}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _broken_rules(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue  # about a change, and there is no old object here
        if not _holds(rule["rule"], value):
            yield f"{path}: {rule.get('message') or rule['rule']}"
    if isinstance(value, dict):
        for key, inner in value.items():
            below = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from _broken_rules(below, inner, f"{path}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield from _broken_rules(schema["items"], inner, f"{path}[{index}]")


def _holds(rule: str, value: Any) -> bool:
    return bool(_program(rule).evaluate({"self": celpy.json_to_cel(value)}))


@functools.cache
def _program(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions={"find": _find, "split": _split})


def _find(text: celtypes.Value, pattern: celtypes.Value) -> celtypes.Value:
    """Kubernetes' string library, which cel-python lacks."""
    found = re.search(str(pattern), str(text))
    return celtypes.StringType(found[0] if found else "")


def _split(text: celtypes.Value, separator: celtypes.Value) -> celtypes.Value:
    return celtypes.ListType([celtypes.StringType(part) for part in str(text).split(str(separator))])
