"""The commands of docs/deployment/kubernetes.md print what it says."""

from __future__ import annotations

import pytest
import yaml

from tests.aws.tutorial import Shown, shown
from tests.helm.chart import CHART, EXAMPLES, Helm, Refused, example

STEPS = list(shown("kubernetes.md"))
[DEMO] = [path for path in EXAMPLES if path.stem == "demo"]


def test_there_are_some() -> None:
    assert len(STEPS) >= 3
    assert yaml.safe_load(DEMO.read_text()) is not None


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_step(helm: Helm, step: Shown) -> None:
    """The values are the tutorial's: those of the demo example."""
    program, *words = step.command.split()
    place = words.index("-f")
    assert (program, words[place + 1]) == ("helm", "my-mesh.yaml")
    words = [str(CHART) if word == "helm/expertmesh" else word for word in words[:place] + words[place + 2 :]]
    try:
        printed = helm.run(*words, values=example(DEMO))
    except Refused as refused:
        printed = str(refused)
    assert step.agrees_with(printed), printed
