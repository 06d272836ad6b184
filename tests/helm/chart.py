"""Rendering the chart with the real helm, and finding objects in what comes out."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "expertmesh"
EXAMPLES = sorted((ROOT / "helm" / "examples").glob("*.yaml"))
RELEASE, NAMESPACE = "mesh", "serving"
NAME = "mesh-expertmesh"

Object = dict[str, Any]


class Refused(Exception):
    """helm's own words."""


class Objects(list[Object]):
    """Kubernetes objects of one rendering."""

    def of(self, kind: str) -> list[Object]:
        return [each for each in self if each["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        [found] = [each for each in self.of(kind) if name is None or each["metadata"]["name"] == name]
        return found

    @property
    def cluster(self) -> Object:
        """The Ray cluster of the RayService."""
        spec: Object = self.one("RayService")["spec"]["rayClusterConfig"]
        return spec

    def group(self, name: str) -> Object:
        """A worker group."""
        [found] = [each for each in self.cluster["workerGroupSpecs"] if each["groupName"] == name]
        return dict(found)

    def pods(self) -> list[Object]:
        """Pod specs of head and workers."""
        groups = [self.cluster["headGroupSpec"], *self.cluster["workerGroupSpecs"]]
        return [group["template"]["spec"] for group in groups]

    @property
    def mesh(self) -> Object:
        """The mesh's configuration in the Serve config."""
        [application] = yaml.safe_load(self.one("RayService")["spec"]["serveConfigV2"])["applications"]
        return dict(application["args"]["mesh"])


class Helm:
    """Runs the binary with a home of its own, so that no setting of the user counts."""

    def __init__(self, binary: Path, home: Path, kubeconfig: Path | None = None) -> None:
        self._binary = binary
        self._environment = {
            "HOME": str(home),
            "PATH": os.environ.get("PATH", ""),
            "KUBECONFIG": str(kubeconfig or home / "none"),
        }
        self._rendered: dict[str, Objects] = {}

    def run(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """Standard output. Raises Refused with standard error."""
        command = [str(self._binary), *arguments, *(["-f", "-"] if values is not None else [])]
        done = subprocess.run(
            command,
            input=None if values is None else json.dumps(values),
            capture_output=True,
            text=True,
            env=self._environment,
            check=False,
        )
        if done.returncode != 0:
            raise Refused(done.stderr or done.stdout)
        return done.stdout

    def template(self, values: Mapping[str, Any] | None = None, *arguments: str) -> Objects:
        """Objects of the chart with `values`; equal calls render once, so treat them as read-only."""
        key = json.dumps([values, arguments])
        if key not in self._rendered:
            self._rendered[key] = parse(self.run(*_template(arguments), values=values or {}))
        return self._rendered[key]


def _template(arguments: Sequence[str]) -> list[str]:
    return ["template", RELEASE, str(CHART), "--namespace", NAMESPACE, *arguments]


def parse(text: str) -> Objects:
    """Objects of a YAML stream."""
    return Objects(each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each is not None)


def example(path: Path) -> dict[str, Any]:
    """Values of an example."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values
