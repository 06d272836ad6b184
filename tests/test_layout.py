"""Guards for the one unusual thing in this repository, a folder named platform/, and for the direction of imports."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("platform", "deployments", "routing", "kv_store")


def test_the_standard_library_is_not_shadowed() -> None:
    assert platform.python_version()
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize("name", PACKAGES)
def test_package_links(name: str) -> None:
    link = ROOT / "src" / "expertmesh" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert not link.readlink().is_absolute()


def test_no_test_lives_under_platform() -> None:
    assert not list((ROOT / "platform").rglob("*test*.py"))


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("routing", ("expertmesh.deployments", "expertmesh.kv_store", "ray", "boto3", "fastapi")),
        ("kv_store", ("expertmesh.deployments", "expertmesh.routing", "ray", "fastapi")),
        ("deployments", ("boto3",)),
    ],
)
def test_arrows_run_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    for file in (ROOT / package).rglob("*.py"):
        wrong = {n for n in _imported(file) for f in forbidden if n == f or n.startswith(f + ".")}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_sdk_config_cli_and_metrics_import_neither_torch_nor_ray_nor_vllm() -> None:
    code = (
        "import sys, expertmesh, expertmesh.platform.config, expertmesh.platform.cli; expertmesh.Client;"
        "import expertmesh.platform.metrics.docs;"
        "print(sorted({'torch', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kv_store_folder_tells_what_it_is() -> None:
    assert (ROOT / "kv_store" / "__init__.py").read_text().startswith('"""')
