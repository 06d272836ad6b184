"""The checks of test_golden.py can fail: objects that an API server refuses, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.helm.chart import EXAMPLES, Helm, Object, example
from tests.helm.schemas import MISSING, problems

BY_NAME = {path.stem: path for path in EXAMPLES}


@pytest.mark.parametrize(
    ("source", "kind", "break_it", "words"),
    [
        ("demo", "RayService", lambda o: o["spec"].update(serveConfig={}), "'serveConfig' was unexpected"),
        (
            "demo",
            "RayService",
            lambda o: o["spec"]["rayClusterConfig"].update(managedBy="me"),
            "managedBy",
        ),
        ("demo", "RayService", lambda o: o["spec"]["rayClusterConfig"]["autoscalerOptions"].update(version="v3"), "v3"),
        ("demo", "ServiceAccount", lambda o: o.update(roles=[]), "roles"),
        ("demo", "PodDisruptionBudget", lambda o: o["spec"].update(maxUnavailable=[1]), "maxUnavailable"),
        ("capacity-block", "EC2NodeClass", lambda o: o["spec"].update(role="r"), "role"),
        (
            "capacity-block",
            "EC2NodeClass",
            lambda o: o["spec"].update(amiSelectorTerms=[{"alias": "al2023@latest", "id": "ami-1"}]),
            "alias",
        ),
        (
            "capacity-block",
            "NodePool",
            lambda o: o["spec"]["disruption"].update(budgets=[{"nodes": "0", "schedule": "0 9 * * *"}]),
            "duration",
        ),
    ],
)
def test_what_an_api_server_refuses(
    helm: Helm, source: str, kind: str, break_it: Callable[[Object], Any], words: str
) -> None:
    if MISSING:
        pytest.skip(MISSING)
    item = copy.deepcopy(helm.template(example(BY_NAME[source])).of(kind)[0])
    assert problems(item) == []
    break_it(item)
    assert words in "\n".join(problems(item))
