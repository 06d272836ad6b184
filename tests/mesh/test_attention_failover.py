"""Attention replicas and their engines, really killed under running requests of every kind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.timing import free_port
from tests.mesh.test_command_line import BIN, command, wait_until

pytestmark = pytest.mark.mesh

MODEL = "qwen3_moe"
TOKENS = 1000
WORDS = {"type": "array", "items": {"enum": ["alpha", "größe", "漢字", "😀"]}, "minItems": 200, "maxItems": 200}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy with logprobs": {"temperature": 0, "logprobs": 2},
    "stop string": {"temperature": 0, "stop": ["no such text in this answer"]},
    "repetition penalty": {"temperature": 0, "repetition_penalty": 1.2},
    "seeded": {"temperature": 1.0, "seed": 11},
    "presence and frequency": {"temperature": 0, "presence_penalty": 0.8, "frequency_penalty": 0.2},
    "JSON": {"temperature": 0.7, "seed": 3, "structured_outputs": {"json": WORDS}},
    "bad words": {"temperature": 0, "bad_words": ["th", "he"]},
}
"""In texts of random bytes, characters of several tokens are everywhere."""
IN_ONE_PIECE = ("repetition penalty", "bad words")
"""Those that are not streamed."""


class Served:
    """`expertmesh serve` with two attention replicas."""

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self._root = psutil.Process(pid)

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of the mesh whose command line holds `name`."""
        found = []
        for process in self._root.children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def running(self) -> list[int]:
        """Unfinished requests of each replica that serves."""
        replicas = httpx.get(f"{self.url}/mesh/status", timeout=60).json()["attention"]
        return [replica["running"] for replica in replicas if replica["ready"]]

    def moved(self) -> int:
        """Requests that lost their replica so far, as the ingress's log has it."""
        arguments = [argument for process in self.processes("/tmp/xm-") for argument in process.cmdline()]
        folders = [path for path in Path("/tmp").glob("xm-*") if any(f"{path}/" in argument for argument in arguments)]
        logs = [log for folder in folders for log in folder.glob("session_*/logs/worker-*.err")]
        return sum(log.read_text(errors="replace").count("lost its replica after") for log in set(logs))

    def answer(self, kind: str, arrived: Counter[str]) -> dict[str, Any]:
        """What a client gets: text, tokens, log-probabilities, reason to finish and usage; counts what has arrived."""
        body = {
            "model": MODEL,
            "prompt": [11, 90, 200 + len(kind), 45],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "return_token_ids": True,
            **KINDS[kind],
        }
        if kind in IN_ONE_PIECE:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=500)
            assert answer.status_code == 200, answer.text
            whole = answer.json()
            return collected(whole["choices"], whole["usage"])
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        events = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=500) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line and line != "data: [DONE]":
                    events.append(json.loads(line.removeprefix("data: ")))
                    arrived[kind] += 1
        return collected([choice for event in events for choice in event["choices"]], events[-1]["usage"])

    def all_at_once(self, pool: ThreadPoolExecutor, arrived: Counter[str]) -> dict[str, Future[dict[str, Any]]]:
        """A request of each kind."""
        return {kind: pool.submit(self.answer, kind, arrived) for kind in KINDS}


def collected(choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": "".join(c["text"] for c in choices),
        "tokens": [token for c in choices for token in c["token_ids"]],
        "logprobs": [value for c in choices if c["logprobs"] for value in c["logprobs"]["token_logprobs"]],
        "finish_reason": choices[-1]["finish_reason"],
        "usage": (usage["prompt_tokens"], usage["completion_tokens"]),
    }


@pytest.fixture(scope="module")
def mesh(family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, port = tmp_path_factory.mktemp("failover"), free_port()
    config, log = folder / "mesh.yaml", folder / "log"
    settings = {
        "model": str(family(MODEL)),
        "experts": {"mode": "colocated"},
        "attention": {"replicas": 2, "kv_cache_gib": 0.25},
        "telemetry": {"loads_interval_s": 0.1},
    }
    config.write_text(yaml.safe_dump(settings))
    with command(str(BIN / "expertmesh"), "serve", str(config), "--set", f"ingress.port={port}", log=log) as process:
        wait_until(lambda: b"ready" in log.read_bytes(), process, log, 570)
        yield Served(f"http://127.0.0.1:{port}", process.pid)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(120)


def eventually(check: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(mesh: Served) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(len(KINDS)) as pool:
        return {kind: future.result() for kind, future in mesh.all_at_once(pool, Counter()).items()}


@pytest.mark.parametrize(
    "victim", ["ServeReplica:expertmesh:attention", pytest.param("VLLM::EngineCore", marks=pytest.mark.long)]
)
def test_streams_outlive_their_replica(mesh: Served, undisturbed: dict[str, dict[str, Any]], victim: str) -> None:
    eventually(lambda: len(mesh.running()) == 2)
    victims = mesh.processes(victim)
    assert len(victims) == 2
    moved = mesh.moved()
    with ThreadPoolExecutor(len(KINDS)) as pool:

        def both_work() -> dict[str, Future[dict[str, Any]]] | None:
            """Requests under way at both replicas; None if one had none, as when the ingress has not met it yet."""
            arrived: Counter[str] = Counter()
            futures = mesh.all_at_once(pool, arrived)
            eventually(lambda: min(arrived[kind] for kind in KINDS if kind not in IN_ONE_PIECE) > 10)
            if min(mesh.running()) > 0:
                return futures
            for future in futures.values():
                future.result()
            return None

        deadline = time.monotonic() + 300
        while (futures := both_work()) is None:
            assert time.monotonic() < deadline, "one of two replicas never gets a request"
        victims[0].kill()
        answers = {kind: future.result() for kind, future in futures.items()}
    for kind, answer in answers.items():
        expected = undisturbed[kind]
        assert answer == {**expected, "logprobs": pytest.approx(expected["logprobs"], abs=1e-3)}, kind
    eventually(lambda: mesh.moved() > moved, 30)
