"""Debian's Prometheus: its tool, and a server that scrapes and is asked."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.timing import free_port
from tests.support.debian import default_cache, unpacked

PATIENCE_S = 60.0
_SELECTOR = re.compile(r"\b(?:ray|autoscaler)_\w+(?:\{[^}]*\})?")


def program(name: str) -> Path:
    """`prometheus` or `promtool`: an installed one, else Debian's. Skips the test where neither can be had."""
    if (installed := shutil.which(name)) is not None:
        return Path(installed)
    root = default_cache() / "debian-prometheus"
    if (why := unpacked(["prometheus"], root)) is not None:
        pytest.skip(f"no {name} is installed, and {why}")
    return root / "usr" / "bin" / name


def promtool(*arguments: str | Path, cwd: Path | None = None) -> str:
    """What it prints; fails the test if it finds fault."""
    done = subprocess.run([program("promtool"), *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def selectors(expression: str) -> list[str]:
    """The series that an expression asks for, each with its label matchers."""
    return [match[0] for match in _SELECTOR.finditer(expression)]


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def get(self, path: str, **parameters: str) -> dict[str, Any]:
        """What its API answers."""
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        data: dict[str, Any] = answer.json()["data"]
        return data

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result's series now. Fails the test for an expression that is none."""
        found: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """The only value of a result; NaN, which equals nothing, where there is none."""
        found = [float(each["value"][1]) for each in self.query(expression)]
        assert len(found) <= 1, f"{expression}: {len(found)} values"
        return found[0] if found else math.nan

    def without_data(self, expressions: Sequence[str], patience_s: float = PATIENCE_S) -> list[str]:
        """Those of the expressions that return nothing although they were asked until the patience was over."""
        deadline = time.monotonic() + patience_s
        left = list(expressions)
        while True:
            left = [expression for expression in left if not self.query(expression)]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Closes the connections to it."""
        self._client.close()


def scraping(targets: Sequence[str], rules: Path) -> dict[str, Any]:
    """The configuration of a server that scrapes `targets` (host:port) every second and evaluates `rules`."""
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": list(targets)}]}],
    }


@contextmanager
def running(folder: Path, configuration: dict[str, Any]) -> Iterator[Prometheus]:
    """A server on loopback, with its files in `folder`."""
    folder.mkdir()
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(configuration))
    promtool("check", "config", config)
    port = free_port()
    flags = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program("prometheus"), *flags], stdout=log, stderr=log)
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not server.ready():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus does not answer"
            time.sleep(0.05)
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait(30)
