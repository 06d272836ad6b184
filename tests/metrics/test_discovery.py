"""The Prometheus configuration for `ray up` clusters, as the documentation has it, against the head of a real Ray."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.timing import free_port
from tests.metrics.charts import RULES, rules
from tests.metrics.prometheus import PATIENCE_S, Prometheus, running

PAGE = Path(__file__).parents[2] / "docs" / "deployment" / "ray-cluster.md"
HEAD = """
import sys, ray
ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_port=int(sys.argv[1]), _temp_dir=sys.argv[2],
         object_store_memory=100 << 20, log_to_driver=False)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def dashboard() -> Iterator[str]:
    """host:port of the dashboard of a Ray head in a process of its own: this one may have a mesh's."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="xmh-")  # short: Ray puts unix sockets below it
    pipe = subprocess.PIPE
    arguments = [sys.executable, "-c", HEAD, str(port), folder]
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == b"ready\n"
        yield f"127.0.0.1:{port}"
        head.communicate()  # the end of its input is the end of it
    shutil.rmtree(folder, ignore_errors=True)


def test_the_documented_configuration_finds_every_node(dashboard: str, tmp_path: Path) -> None:
    (block,) = [
        text for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if "scrape_configs" in text
    ]
    config = yaml.safe_load(
        block.replace("127.0.0.1:8265", dashboard).replace("/etc/prometheus/expertmesh.yaml", str(RULES))
    )
    config["global"] |= {"scrape_interval": "1s"}
    config["scrape_configs"][0]["http_sd_configs"][0]["refresh_interval"] = "1s"
    with running(tmp_path / "prometheus", config) as server:
        assert server.without_data(["ray_node_mem_total", 'up{job="ray"} == 1'], 2 * PATIENCE_S) == []
        assert alerts_known_to(server) == rules().keys()


def alerts_known_to(server: Prometheus) -> set[str]:
    """The names of the alert rules that it has loaded."""
    groups = server.get("/api/v1/rules")["groups"]
    return {rule["name"] for group in groups for rule in group["rules"]}
