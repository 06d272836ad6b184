"""Does a mesh that is asked for more than it can do go on doing what it can?

    python -m benchmarks.overload [--quick] [--proxy serve]

Two whole meshes (Ray Serve, HTTP, a tiny model, one attention replica that computes 8 sequences at once) are asked in
turn: one refuses what would wait longer than 2 s for its first token (`ingress.max_wait_s`), the other has no such
bound. First each is saturated by clients that ask again as soon as they are answered: that rate is `saturating_per_s`.
Then requests come at random at 0.5, 1, 2 and 5 times this rate, whatever becomes of those before (Poisson, seeded),
each with the time that its client gives it (`X-Request-Timeout`, 20 s). Goodput is what was answered whole with its
first token within 3 s, in requests a second of the load. Resident memory is that of all processes that serve the mesh.
Last line: one JSON object; `goodput_of_peak` is the worst goodput at 2 and 5 times the saturating load over the best at
any, for the mesh with the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.bare import Worker, engine_environment
from benchmarks.checkpoints import write_family
from benchmarks.parity import prompts_for, vocabulary_of
from benchmarks.timing import free_port

MODEL = "tiny"
SEQUENCES, TOKENS, PROMPTS = 8, 128, 24
MAX_WAIT_S, TARGET_S, CLIENT_S = 2.0, 3.0, 20.0
NO_BOUND_S = 1e6
LOADS = (0.5, 1.0, 2.0, 5.0)
ROUNDS, QUICK_ROUNDS = 3, 1
SECONDS = 20.0
SATURATING = 2 * SEQUENCES
"""Clients that saturate a mesh."""


@dataclass
class Tally:
    """What became of the requests of one load."""

    seconds: float
    answers: Counter[int] = field(default_factory=Counter)
    """By HTTP status; 0 is a stream that broke off."""
    first_s: list[float] = field(default_factory=list)
    """Time to first token of those that were answered whole."""

    @property
    def goodput(self) -> float:
        """Requests a second that met the target."""
        return sum(first <= TARGET_S for first in self.first_s) / self.seconds


class Served:
    """A whole mesh in a process; to be run by a Worker."""

    def __init__(self, folder: Path, max_wait_s: float, proxy: str) -> None:
        engine_environment(1)
        from expertmesh.deployments.local import LocalMesh
        from expertmesh.platform.config import load_config

        settings = {
            "model": {"source": str(folder), "served_name": MODEL, "dtype": "float32"},
            "ingress": {"port": free_port(), "max_wait_s": max_wait_s, "proxy": proxy},
            "attention": {"kv_cache_gib": 0.25, "max_num_seqs": SEQUENCES, "prefix_caching": False},
        }
        self._mesh = LocalMesh(load_config(settings)).start()

    def url(self) -> str:
        """Where it answers."""
        return self._mesh.url

    def rss_mib(self) -> int:
        """Resident memory of the processes that serve it."""
        return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True)) >> 20

    def close(self) -> None:
        """Ends it."""
        self._mesh.close()


class Side:
    """One mesh and what is asked of it."""

    def __init__(self, mesh: Worker, prompts: list[list[int]]) -> None:
        self.mesh = mesh
        self.per_s = 0.0
        """Its saturating rate."""
        self._url: str = mesh.ask("url")
        self._prompts = prompts

    def saturate(self, seconds: float) -> float:
        """Requests a second that it answers at most."""
        return asyncio.run(self._saturate(seconds))

    async def _saturate(self, seconds: float) -> float:
        tally = Tally(seconds)
        end = time.monotonic() + seconds

        async def client(http: aiohttp.ClientSession, first: int) -> None:
            turn = first
            while time.monotonic() < end:
                await self._ask(http, turn, tally)
                turn += 1

        async with self._http() as http:
            begin = time.monotonic()
            await asyncio.gather(*(client(http, i) for i in range(SATURATING)))
            return len(tally.first_s) / (time.monotonic() - begin)

    def load(self, times: float, seconds: float, seed: int) -> Tally:
        """Offers `times` the saturating rate, and waits until every request has ended."""
        return asyncio.run(self._load(times * self.per_s, seconds, random.Random(seed)))

    async def _load(self, per_s: float, seconds: float, rng: random.Random) -> Tally:
        tally = Tally(seconds)
        async with self._http() as http, asyncio.TaskGroup() as requests:
            begin, at, turn = time.monotonic(), 0.0, 0
            while (at := at + rng.expovariate(per_s)) < seconds:
                await asyncio.sleep(max(0.0, begin + at - time.monotonic()))
                requests.create_task(self._ask(http, turn, tally))
                turn += 1
        return tally

    def _http(self) -> aiohttp.ClientSession:
        """A client that takes little of the cores that it shares with the mesh."""
        headers = {"X-Request-Timeout": str(CLIENT_S)}
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(4 * CLIENT_S)
        return aiohttp.ClientSession(self._url, connector=connector, timeout=timeout, headers=headers)

    async def _ask(self, http: aiohttp.ClientSession, turn: int, tally: Tally) -> None:
        body = {
            "model": MODEL,
            "prompt": self._prompts[turn % len(self._prompts)],
            "max_tokens": TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        begin = time.monotonic()
        first, whole = 0.0, False
        async with http.post("/v1/completions", json=body) as answer:
            async for line in answer.content:
                if answer.status == 200 and line.startswith(b'data: {"id"'):
                    first = first or time.monotonic() - begin
                    whole = whole or b'"completion_tokens":%d' % TOKENS in line
        tally.answers[answer.status if whole or answer.status != 200 else 0] += 1
        if whole:
            tally.first_s.append(first)


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round instead of {ROUNDS}")
    parser.add_argument("--proxy", choices=["serve", "haproxy"], default="haproxy", help="before the meshes' ingress")
    options = parser.parse_args()
    engine_environment(1)
    with tempfile.TemporaryDirectory(prefix="overload-") as scratch:
        folder = write_family("qwen3_moe", Path(scratch) / MODEL)
        prompts = prompts_for(vocabulary_of(folder), PROMPTS)
        with (
            Worker(Served, folder, MAX_WAIT_S, options.proxy) as bounded,
            Worker(Served, folder, NO_BOUND_S, options.proxy) as unbounded,
        ):
            sides = {"bounded": Side(bounded, prompts), "unbounded": Side(unbounded, prompts)}
            result = measure(sides, QUICK_ROUNDS if options.quick else ROUNDS)
    print(json.dumps({**result, "proxy": options.proxy}))


def measure(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """All loads on all sides in turn; see the module's text."""
    result: dict[str, Any] = {name: {"load": {}} for name in sides}
    for name, side in sides.items():
        side.saturate(SECONDS / 2)  # a warm-up
        side.per_s = side.saturate(SECONDS)
        result[name].update(saturating_per_s=round(side.per_s, 2), rss_mib_before=side.mesh.ask("rss_mib"))
        print(f"{name}: saturated by {side.per_s:.2f} requests/s", flush=True)
    tallies: dict[tuple[str, float], list[Tally]] = {}
    for turn in range(rounds):
        for times in LOADS:
            for name, side in sides.items():
                tally = side.load(times, SECONDS, turn)
                tallies.setdefault((name, times), []).append(tally)
                print(f"{name} x {times:g}: goodput {tally.goodput:.2f}/s, {dict(tally.answers)}", flush=True)
    for (name, times), found in tallies.items():
        first_s = [first for tally in found for first in tally.first_s]
        result[name]["load"][f"{times:g}"] = {
            "goodput_per_s": round(statistics.median(tally.goodput for tally in found), 2),
            "ttft_p50_s": round(statistics.median(first_s), 2) if first_s else None,
            "answers": dict(sum((tally.answers for tally in found), Counter[int]())),
        }
    for name, side in sides.items():
        result[name]["rss_mib_after"] = side.mesh.ask("rss_mib")
        result[name]["goodput_of_peak"] = of_peak(result[name]["load"])
    return {"goodput_of_peak": result["bounded"]["goodput_of_peak"], **result}


def of_peak(loads: dict[str, dict[str, Any]]) -> float:
    """The worst goodput at 2 and 5 times the saturating load over the best at any."""
    goodput = {times: load["goodput_per_s"] for times, load in loads.items()}
    return round(min(goodput["2"], goodput["5"]) / max(max(goodput.values()), 1e-9), 3)


if __name__ == "__main__":
    main()
