"""The chart with every example: no lint, the same objects as before, and objects that an API server takes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml

from expertmesh.platform.config import MeshConfig
from tests.helm.chart import CHART, EXAMPLES, Helm, Object, Objects, example
from tests.helm.schemas import MISSING, problems

GOLDEN = Path(__file__).parent / "golden"

pytestmark = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def _comparable(objects: Objects) -> list[Object]:
    """In a fixed order, the Serve config as what it says, and random secrets by their length."""
    found = copy.deepcopy(list(objects))
    for each in found:
        if each["kind"] == "RayService":
            each["spec"]["serveConfigV2"] = yaml.safe_load(each["spec"]["serveConfigV2"])
        if each["kind"] == "Secret":
            each["data"] = {key: f"{len(value)} characters" for key, value in each["data"].items()}
    return sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))


def test_same_objects_as_before(helm: Helm, path: Path) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/helm` writes them anew."""
    target = GOLDEN / path.name
    found = _comparable(helm.template(example(path)))
    if os.environ.get("UPDATE_GOLDEN"):
        target.write_text(yaml.safe_dump_all(found, sort_keys=True, width=120))
    assert found == list(yaml.safe_load_all(target.read_text()))


def test_lint(helm: Helm, path: Path) -> None:
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART), values=example(path))


def test_an_api_server_takes_them(helm: Helm, path: Path) -> None:
    if MISSING:
        pytest.skip(MISSING)
    objects = helm.template(example(path))
    assert len(objects) >= 6
    assert {each["metadata"]["name"]: found for each in objects if (found := problems(each))} == {}


def test_names_are_distinct_and_short_enough(helm: Helm, path: Path) -> None:
    objects = helm.template(example(path))
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 63 for _, name in names)


def test_the_mesh_is_one_that_the_builder_takes(helm: Helm, path: Path) -> None:
    objects = helm.template(example(path))
    mesh = MeshConfig.model_validate(objects.mesh)
    slots = {"attention": 0, "experts": 0}
    for group in objects.cluster["workerGroupSpecs"]:
        for side in slots:
            slots[side] += int(group["resources"].get(f"expertmesh_{side}", 0)) * group["maxReplicas"]
    scaling = mesh.autoscaling.attention
    assert slots["attention"] >= (scaling.max_replicas if scaling is not None else mesh.attention.replicas)
    if mesh.experts.mode == "mesh":
        assert slots["experts"] >= mesh.experts.shards
