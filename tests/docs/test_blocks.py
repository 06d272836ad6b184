"""Code blocks of the documentation: Python runs, commands parse and run, configurations pass the check."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.config import config_schema, load_config
from expertmesh.platform.config import schema as schemas
from tests.docs.blocks import ROOT, Block, Line, blocks, command_lines
from tests.support.command import expertmesh
from tests.support.command_lines import parsed

SCHEMA = config_schema()

STARTS_A_MESH = ("LocalMesh(",)
"""Python that starts a mesh of its own is compiled; tests/mesh runs `LocalMesh`."""

READERS_FILES = {
    "mesh.yaml",
    "my-mesh.yaml",
    "too-much.yaml",
    "infrastructure.yaml",
    "keys.json",
    "stack.yaml",
    "./tiny",
    "./qwen3-30b",
    "./qwen3-235b-a22b",
}
"""What the reader writes, downloads or is given by a command before."""

RUN_ALONE = {"version", "config show", "config check", "config schema", "keys create", "keys list", "keys revoke"}
RUN_WITH_MESH = {"status", "placement show", "placement plan"}
"""The others start a mesh, change a running one for the tests after it, or need AWS or a KV store: their own tests run
them. So do these with --watch, which ends by Ctrl-C."""

PYTHON = blocks("python")
LINES = list(command_lines())
YAML = blocks("yaml")


def test_there_are_blocks() -> None:
    """The pages are found and read."""
    assert len(PYTHON) >= 5
    assert len(LINES) >= 60
    assert len(YAML) >= 4
    assert {"README.md", "docs/quickstart.md", "docs/deployment/aws.md"} <= {line.block.page for line in LINES}


# --- Python ---


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.mesh
def test_python_runs(demo_mesh: LocalMesh) -> None:
    """As a reader's script, against a mesh of the demo model."""
    environment = {**os.environ, "EXPERTMESH_URL": demo_mesh.url}
    for block in PYTHON:
        if any(word in block.text for word in STARTS_A_MESH):
            continue
        script = block.text.replace("http://127.0.0.1:8000", demo_mesh.url)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, timeout=240
        )
        assert done.returncode == 0, f"{block}: {done.stderr}"
        assert done.stdout.strip(), f"{block} prints nothing"


# --- commands ---


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_parses(line: Line) -> None:
    _, values = parsed(line.text)
    for name in ("config", "source", "file", "stack", "folder"):
        named = values.get(name)
        if named is None or str(named) == "demo" or str(named).startswith("s3://"):
            continue
        known = str(named) in READERS_FILES or f"./{named}" in READERS_FILES
        assert known or (ROOT / str(named)).exists(), f"{line}: there is no {named}"
    for change in values.get("changes") or ():
        key = change.partition("=")[0]
        assert key == "model" or schemas.node_at(SCHEMA, key.split(".")) is not None, f"{line}: no field {key}"


def _run(lines: list[Line], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "mesh.yaml").write_text("model: demo\n")
    for line in lines:
        words = line.text.partition("  #")[0]
        done = expertmesh(*_split(words))
        assert (done.code, done.err) == (0, ""), f"{line}: {done.err}"
        assert done.out


def _split(text: str) -> list[str]:
    return shlex.split(text, comments=True)[1:]


def _to_run(commands: set[str]) -> dict[str, list[Line]]:
    """By page."""
    found: dict[str, list[Line]] = {}
    for line in LINES:
        command, values = parsed(line.text)
        if command in commands and not values.get("watch"):
            found.setdefault(line.block.page, []).append(line)
    return found


ALONE = _to_run(RUN_ALONE)


@pytest.mark.parametrize("page", ALONE)
def test_commands_that_need_no_mesh_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in ALONE[page] if not _names_an_example(line)]
    _run(lines, tmp_path, monkeypatch)
    monkeypatch.chdir(ROOT)
    for line in ALONE[page]:
        if _names_an_example(line):
            assert expertmesh(*_split(line.text)).code == 0


def _names_an_example(line: Line) -> bool:
    return "examples/" in line.text


@pytest.mark.mesh
def test_commands_run_against_a_mesh(demo_mesh: LocalMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_URL", demo_mesh.url)
    lines = [line for page in _to_run(RUN_WITH_MESH).values() for line in page if "--url" not in line.text]
    assert {parsed(line.text).command for line in lines} == RUN_WITH_MESH
    _run(list({line.text.split("#")[0].strip(): line for line in lines}.values()), tmp_path, monkeypatch)


# --- YAML ---


OTHER_TOOLS = ({"global", "rule_files", "scrape_configs"}, {"receivers", "processors", "exporters", "service"})
"""Sections of Prometheus' and of OpenTelemetry's collector: the one is used in tests/metrics, the other has no test."""


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_a_configuration(block: Block) -> None:
    """Of a mesh, or values of the chart."""
    data: Any = yaml.safe_load(block.text)
    if set(data) in OTHER_TOOLS:
        return
    if set(data) <= set(SCHEMA["properties"]):
        load_config(data)
        return
    chart = json.loads((ROOT / "helm" / "expertmesh" / "values.schema.json").read_text())
    assert set(data) <= set(chart["properties"]), f"{block} is neither"
    jsonschema.validate(data, {key: value for key, value in chart.items() if key != "required"})
