"""A mesh started by the command line and by Serve's own tools, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from benchmarks.timing import free_port

pytestmark = pytest.mark.mesh

BIN = Path(sys.executable).parent
START_S = 300


def abstract_sockets() -> str:
    """Names of all unix sockets on this machine."""
    return Path("/proc/net/unix").read_text()


def files_of(processes: list[psutil.Process]) -> set[Path]:
    """What these processes have mapped in shared memory, their mailboxes, and the folders of their private Ray."""
    held: set[Path] = set()
    for process in processes:
        held.update(Path("/dev/shm").glob(f"expertmesh-{process.pid}-*"))
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        held.update(Path(line.split()[5]) for line in maps if " /dev/shm/" in line)
        for argument in process.cmdline():
            held.update(path for path in Path("/tmp").glob("xm-*") if f"{path}/" in argument)
    return held


@contextmanager
def command(*arguments: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, its output in `log`; killed with its group if the block leaves it running."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until(
    check: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = START_S
) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"not in {seconds} s: {log.read_text()[-3000:]}"
        time.sleep(0.3)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_serve_answers_and_ctrl_c_leaves_nothing(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder, port, log = family("qwen2_moe"), free_port(), tmp_path / "log"  # 10 experts: 3 shards don't divide them
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump({"model": str(folder), "experts": {"shards": 3, "redundancy": 2}}))
    serve = [str(BIN / "expertmesh"), "serve", str(config), "--set", f"ingress.port={port}"]
    url = f"http://127.0.0.1:{port}"
    with command(*serve, log=log) as process:
        wait_until(lambda: b"ready" in log.read_bytes(), process, log)
        family_tree = psutil.Process(process.pid).children(recursive=True)
        body = {"model": "qwen2_moe", "prompt": "hello", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        status = subprocess.run(
            [str(BIN / "expertmesh"), "status", "--url", url, "--json"], capture_output=True, text=True, check=True
        )
        report = json.loads(status.stdout)
        assert report["placement"]["redundancy"] == 2
        assert len(report["shards"]) == 3
        sockets = [a.removeprefix("unix:") for s in report["shards"] for a in s["addresses"] if a.startswith("unix:")]
        files = files_of(family_tree)
        assert len(sockets) == 3
        assert all(socket in abstract_sockets() for socket in sockets)
        assert {path.parent.name for path in files} >= {"shm", "tmp"}
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group gets it
        assert process.wait(60) == 0, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(family_tree, timeout=10)
    assert not alive, [p.cmdline() for p in alive]
    assert not [path for path in files if path.exists()]
    assert not [socket for socket in sockets if socket in abstract_sockets()]
    down = subprocess.run(
        [str(BIN / "expertmesh"), "status", "--url", url], capture_output=True, text=True, check=False
    )
    assert down.returncode == 1
    assert "Traceback" not in down.stderr


@pytest.mark.parametrize("how", ["deploy", pytest.param("run", marks=pytest.mark.long)])
def test_serve_with_the_builder_serves_a_dense_model_colocated(
    family: Callable[[str], Path], tmp_path: Path, how: str
) -> None:
    """By `serve deploy` and by `serve run`."""
    folder, port, log = family("olmo2"), free_port(), tmp_path / "log"
    config = tmp_path / "mesh.yaml"
    config.write_text(yaml.safe_dump({"model": str(folder), "experts": {"mode": "colocated"}}))
    options = yaml.safe_dump(
        {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [
                {
                    "name": "expertmesh",
                    "import_path": "expertmesh.deployments:build_app",
                    "args": {"config": str(config)},
                    "route_prefix": "/",
                }
            ],
        }
    )
    (tmp_path / "serve.yaml").write_text(options)
    # A Ray of its own: `serve run` would start one with the default port and folder.
    ray_port, dashboard_port, ray_folder = free_port(), free_port(), Path(f"/tmp/xm-{os.getpid()}")
    head = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--port={ray_port}", "--num-cpus=4"),
        *("--include-dashboard=true", f"--dashboard-port={dashboard_port}", f"--temp-dir={ray_folder}"),
        *(f"--object-store-memory={200 << 20}", "--disable-usage-stats"),
    ]
    address, dashboard = f"127.0.0.1:{ray_port}", f"http://127.0.0.1:{dashboard_port}"

    def check_answers(url: str) -> None:
        body = {"model": "olmo2", "prompt": "hello", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert httpx.get(f"{url}/mesh/status").json()["mode"] == "colocated"

    with command(*head, log=tmp_path / "ray") as ray_head:
        wait_until(lambda: b"Ray runtime started" in (tmp_path / "ray").read_bytes(), ray_head, tmp_path / "ray")
        url = f"http://127.0.0.1:{port}"
        if how == "run":
            run = [str(BIN / "serve"), "run", f"--address={address}", str(tmp_path / "serve.yaml")]
            with command(*run, log=log) as process:
                wait_until(lambda: answers(url), process, log)
                check_answers(url)
                process.send_signal(signal.SIGINT)
                process.wait(60)
            assert not answers(url)
        else:
            deploy = [str(BIN / "serve"), "deploy", f"--address={dashboard}", str(tmp_path / "serve.yaml")]
            done = subprocess.run(deploy, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            wait_until(lambda: answers(url), ray_head, tmp_path / "ray")
            check_answers(url)
        family_tree = psutil.Process(ray_head.pid).children(recursive=True)
        ray_head.terminate()
        ray_head.wait(60)
        psutil.wait_procs(family_tree, timeout=20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "/no/such/folder"], "/no/such/folder"),
        (["serve", "demo", "--set", "experts.shrads=3"], "shards"),
        (["serve", "demo", "--set", "experts.redundancy=5"], "redundancy"),
    ],
)
def test_a_bad_start_is_refused_in_words(arguments: list[str], words: str) -> None:
    done = subprocess.run([str(BIN / "expertmesh"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_checkpoint_is_refused_before_anything_starts(family: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(family("qwen3_moe"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = subprocess.run([str(BIN / "expertmesh"), "serve", str(broken)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
