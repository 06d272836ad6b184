"""A mesh with the embedded store: a replacement replica's hits, the command line, and what is left afterwards."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.timing import free_port
from expertmesh.deployments.local import LocalMesh
from expertmesh.errors import ConfigError
from expertmesh.kv_store.configured import embedded_link, embedded_password
from expertmesh.platform.config import MeshConfig, cluster_secret, load_config
from tests.mesh.test_command_line import BIN, answers, command, wait_until

pytestmark = pytest.mark.mesh

PATIENCE_S = 900
"""A machine with too much to do takes its time to start an engine."""
SECRET_WORDS = "the crown jewels are under the oak"
BLOCKS = 3
BLOCK = 128
SERVED = "tiny"


def write_config(folder: Path, model: Path) -> tuple[Path, str]:
    """A mesh of one attention replica that holds the experts itself, over an embedded store: (file, URL)."""
    port = free_port()
    config = {
        "model": {"source": str(model), "served_name": SERVED, "cache_dir": str(folder / "cache")},
        "attention": {"kv_cache_gib": 0.25, "inactivity_timeout_s": 300},
        "experts": {"mode": "colocated"},
        # A machine with too much to do must not make a lookup miss its deadline.
        "kv_store": {"url": "embedded", "memory_gib": 0.25, "host_memory_mib": 64, "lookup_timeout_ms": 2000},
        "ingress": {"port": port},
        "telemetry": {"log_level": "debug", "log_format": "json"},
    }
    file = folder / "mesh.yaml"
    file.write_text(yaml.safe_dump(config))
    return file, f"http://127.0.0.1:{port}"


def valkeys(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "valkey" in child.name()]


class Exported:
    """What Ray's exporter says, at the address that `expertmesh serve` printed."""

    def __init__(self, log: Path) -> None:
        printed = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)", log.read_text())
        assert printed is not None
        self._url = printed[1]

    def sum(self, name: str, labels: dict[str, str]) -> float:
        """Of a series over all processes."""
        families = text_string_to_metric_families(httpx.get(self._url, timeout=60).text)
        samples = [sample for family in families if family.name == name for sample in family.samples]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def check_logs(process: subprocess.Popen[bytes], log: Path, config: MeshConfig) -> None:
    """Of a mesh that logs JSON at debug level: each line says whose it is, and none what it must not."""
    arguments = [word for child in psutil.Process(process.pid).children(recursive=True) for word in child.cmdline()]
    folders = [path for path in Path("/tmp").glob("xm-*") if any(f"{path}/" in word for word in arguments)]
    files = [file.resolve() for folder in folders for file in folder.glob("session_*/logs/**/*") if file.is_file()]
    text = "\n".join(file.read_text(errors="replace") for file in {log, *files})
    secret = cluster_secret(config, create_in=config.model.resolved_cache_dir)
    for hidden in (SECRET_WORDS, "crown jewels", secret.decode(errors="replace"), embedded_password(secret)):
        assert hidden not in text, [line for line in text.splitlines() if hidden in line][:3]
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
    named = [line for line in lines if line.get("request_id") == "a-named-request"]
    assert {line["message"].rpartition(" ")[2] for line in named if line["logger"] == "expertmesh.attention"} == {
        "begins",
        "finished",
    }
    assert {line["deployment"] for line in named} >= {"attention"}
    assert {line["deployment"] for line in lines if line["logger"].startswith("vllm.v1.engine.core")} == {"attention"}


def kv(*words: str) -> Any:
    done = subprocess.run([BIN / "expertmesh", "kv", *words, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_replacement_replica_finds_the_blocks_of_the_one_before(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    file, url = write_config(tmp_path, family("qwen3_moe"))
    draw = random.Random(5)
    prompt = [draw.randrange(10, 300) for _ in range(BLOCKS * BLOCK + 20)]
    body = {"model": SERVED, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    log = tmp_path / "log"
    with command(str(BIN / "expertmesh"), "serve", str(file), log=log) as process:
        wait_until(lambda: answers(url), process, log, PATIENCE_S)

        def ask() -> tuple[Any, int]:
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            details = answer.json()["usage"]["prompt_tokens_details"] or {}
            return answer.json()["choices"][0]["logprobs"]["tokens"], details.get("cached_tokens") or 0

        def replicas() -> list[dict[str, Any]]:
            status: dict[str, Any] = httpx.get(f"{url}/mesh/status", timeout=60).json()
            return [replica for replica in status["attention"] if replica["ready"]]

        def counts() -> dict[str, int]:
            return dict(replicas()[0].get("kv_store", {}).get("counts", {}))

        asked = {"model": SERVED, "prompt": SECRET_WORDS, "max_tokens": 1}
        named = {"X-Request-Id": "a-named-request"}
        assert httpx.post(f"{url}/v1/completions", json=asked, headers=named, timeout=300).status_code == 200
        expected, cached = ask()
        assert cached == 0
        wait_until(lambda: counts().get("stored") == BLOCKS, process, log, PATIENCE_S)
        (before,) = replicas()
        tree = psutil.Process(process.pid).children(recursive=True)
        (replica,) = [p for p in tree if p.name().startswith("ray::ServeRepli") and "attention" in p.cmdline()[0]]
        replica.kill()

        def replaced() -> bool:
            now = replicas()
            return len(now) == 1 and now[0]["replica"] != before["replica"]

        wait_until(replaced, process, log, PATIENCE_S)
        assert ask() == (expected, BLOCKS * BLOCK)
        wait_until(lambda: counts().get("load_sound") == BLOCKS, process, log, PATIENCE_S)
        exported = Exported(log)
        for name, labels, value in (
            ("ray_expertmesh_kv_store_loads", {"result": "sound"}, BLOCKS),
            ("ray_expertmesh_prompt_tokens", {"source": "store"}, BLOCKS * BLOCK),
            ("ray_expertmesh_kv_store_servers", {"breaker": "closed"}, 1),
        ):
            wait_until(lambda: exported.sum(name, labels) == value, process, log, PATIENCE_S)  # noqa: B023 (used at once)
        assert exported.sum("ray_expertmesh_kv_store_gate", {"decision": "fetch"}) >= 1

        check_logs(process, log, load_config(file))
        (server,) = kv("stats", str(file))
        assert server["blocks"] == BLOCKS
        assert kv("verify", str(file)) == {"sound": BLOCKS, "truncated": 0, "foreign": 0, "corrupt": 0}
        assert kv("flush", str(file)) == {"removed": BLOCKS}
        assert kv("stats", str(file))[0]["blocks"] == 0
        (valkey,) = valkeys(process)
        assert embedded_link(load_config(file)).exists()
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert not valkey.is_running()
    assert not embedded_link(load_config(file)).is_symlink()
    done = subprocess.run([BIN / "expertmesh", "kv", "stats", str(file)], capture_output=True, text=True)
    assert (done.returncode, "no embedded KV store runs" in done.stderr) == (1, True)


def test_a_killed_driver_leaves_no_server(family: Callable[[str], Path], tmp_path: Path) -> None:
    file, _ = write_config(tmp_path, family("qwen3_moe"))
    link = embedded_link(load_config(file))
    log = tmp_path / "log"
    with command(str(BIN / "expertmesh"), "serve", str(file), log=log) as process:
        wait_until(link.exists, process, log, PATIENCE_S)  # it starts before all else
        (valkey,) = valkeys(process)
        folder = link.resolve()
        others = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while (valkey.is_running() or folder.exists() or link.is_symlink()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (valkey.is_running(), folder.exists(), link.is_symlink()) == (False, False, False)
    for child in others:  # Ray may have begun to start
        if child.is_running():
            os.kill(child.pid, signal.SIGKILL)


def test_what_can_not_work_is_refused_before_anything_starts(family: Callable[[str], Path], tmp_path: Path) -> None:
    file, _ = write_config(tmp_path, family("qwen3_moe"))
    config = load_config(file)
    with pytest.raises(ConfigError, match="'embedded' is for a mesh on one machine"):
        LocalMesh(config, "127.0.0.1:6379").start()
    assert not embedded_link(config).is_symlink()
