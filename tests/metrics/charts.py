"""The expressions of the chart's dashboards and alert rules."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

CHART = Path(__file__).parents[2] / "helm" / "expertmesh"
RULES = CHART / "rules" / "expertmesh.yaml"
_COMPARISON = re.compile(r"\s[<>]=?\s[0-9.]+$")


def panels(board: str) -> dict[str, str]:
    """The expressions of a dashboard by `panel/target`, its variables as they are without Kubernetes."""
    content = json.loads((CHART / "dashboards" / f"{board}.json").read_text())
    variables = {"namespace": "", "application": "expertmesh"}
    found = {}
    for panel in content["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(f"${name}", value)
            assert "$" not in expression
            found[f"{panel['title']}/{target['refId']}"] = expression
    return found


def rules() -> dict[str, str]:
    """The expressions of the alert rules by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def sides(expression: str) -> list[str]:
    """What of an alert has data while all is well: its expression without the comparison, or both sides of `unless`."""
    parts = re.split(r"\sunless on \([^)]*\)\s", expression)
    if len(parts) == 1:
        parts = [_COMPARISON.sub("", expression)]
        assert parts != [expression], f"neither a comparison nor `unless`: {expression}"
    return parts
