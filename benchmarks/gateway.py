"""What does the ingress cost, against the same engine called directly and behind vLLM's own API server?

    python -m benchmarks.gateway [--quick] [--proxy haproxy]

One tiny model, `experts.mode: colocated`, the same engine arguments on all sides (executor included): what differs is
what stands before the engine. Closed loops of 1, 8 and 32 clients that ask for completions of 128 tokens, streamed and
in one piece; all sides run at once and are asked in turn, medians of the rounds, ratios within a round. A second mesh
with telemetry on is asked beside the one with telemetry off, at 32 clients. The client's work is on the same cores as
the servers' and is the same for all; the engine called directly has neither HTTP nor a client process.

Last line: one JSON object. `vs_vllm`: requests/s over those of vLLM's server, by clients, the mean of streamed and not
(geometric; both alone are in `streamed` and `whole`). `added_ttft_ms`, `added_itl_ms`: streamed, one client, over the
engine called directly (`added_over_vllm_ms`: over vLLM's server). `telemetry_cost`: part of the requests/s at 32
clients that telemetry takes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.bare import Worker
from benchmarks.checkpoints import VOCAB, write_family
from benchmarks.gateway_sides import MODEL, DirectSide, MeshSide, VllmServer
from benchmarks.http_load import Run, over_http
from benchmarks.parity import prompts_for

CLIENTS = (1, 8, 32)
PROMPT_TOKENS, TOKENS = 32, 128
FULL, QUICK = (5, 8.0), (3, 4.0)
"""Rounds, and seconds of each side in a round."""
TELEMETRY: dict[str, dict[str, Any]] = {"off": {"metrics": False}, "on": {"metrics": True}}
"""Settings below `telemetry` that are compared."""

Drive = Callable[[int, bool, float], Run]
"""Clients, streamed or not, seconds."""


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 4 s instead of 5 of 8 s")
    parser.add_argument("--proxy", choices=["serve", "haproxy"], default="haproxy", help="before the mesh's ingress")
    options = parser.parse_args()
    rounds, seconds = QUICK if options.quick else FULL
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-")))
        sides = _start(stack, scratch, options.proxy)
        for drive in sides.values():
            drive(CLIENTS[-1], True, seconds)  # warms up
        runs = {
            (clients, stream): _rounds(sides, clients, stream, rounds, seconds)
            for clients in CLIENTS
            for stream in (True, False)
        }
    print(json.dumps({**_summary(runs), "proxy": options.proxy}))


def _start(stack: ExitStack, scratch: Path, proxy: str) -> dict[str, Drive]:
    """The sides, all serving."""
    folder = write_family("qwen3_moe", scratch / "model")
    prompts = [(p * PROMPT_TOKENS)[:PROMPT_TOKENS] for p in prompts_for(VOCAB, CLIENTS[-1])]
    server = stack.enter_context(VllmServer(folder, scratch / "vllm.log"))
    direct = stack.enter_context(Worker(DirectSide, folder))
    meshes = {
        name: stack.enter_context(Worker(MeshSide, folder, settings, proxy)) for name, settings in TELEMETRY.items()
    }
    server.wait()

    def drives(url: str) -> Drive:
        return lambda clients, stream, seconds: over_http(url, MODEL, prompts, clients, TOKENS, stream, seconds)

    def directly(clients: int, stream: bool, seconds: float) -> Run:
        run: Run = direct.ask("drive", prompts, clients, TOKENS, stream, seconds)
        return run

    return {
        "direct": directly,
        "vllm": drives(server.url),
        "mesh": drives(meshes["off"].ask("url")),
        "telemetry": drives(meshes["on"].ask("url")),
    }


def _rounds(sides: dict[str, Drive], clients: int, stream: bool, rounds: int, seconds: float) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {}
    for number in range(rounds):
        asked = [name for name in sides if name != "telemetry" or clients == CLIENTS[-1]]
        for name in asked if number % 2 == 0 else asked[::-1]:
            runs.setdefault(name, []).append(sides[name](clients, stream, seconds))
    rates = {name: round(_median(of, "requests_per_s"), 1) for name, of in runs.items()}
    print(f"{clients} clients, {'streamed' if stream else 'in one piece'}: requests/s {rates}", flush=True)
    return runs


def _summary(runs: dict[tuple[int, bool], dict[str, list[Run]]]) -> dict[str, Any]:
    ratios = {
        stream: {clients: _ratio(runs[clients, stream], "mesh", "vllm") for clients in CLIENTS}
        for stream in (True, False)
    }
    most, alone = CLIENTS[-1], runs[CLIENTS[0], True]
    costs = [1 - _ratio(runs[most, stream], "telemetry", "mesh") for stream in (True, False)]
    return {
        "vs_vllm": {str(c): round(math.sqrt(ratios[True][c] * ratios[False][c]), 3) for c in CLIENTS},
        "added_ttft_ms": _added_ms(alone, "ttft_s", "direct"),
        "added_itl_ms": _added_ms(alone, "itl_s", "direct"),
        "telemetry_cost": round(statistics.mean(costs), 4),
        "streamed": {str(c): round(ratio, 3) for c, ratio in ratios[True].items()},
        "whole": {str(c): round(ratio, 3) for c, ratio in ratios[False].items()},
        "vs_direct": {str(c): round(_ratio(runs[c, True], "mesh", "direct"), 3) for c in CLIENTS},
        "added_over_vllm_ms": {
            str(c): {what: _added_ms(runs[c, True], f"{what}_s", "vllm") for what in ("ttft", "itl")} for c in CLIENTS
        },
        "requests_per_s": {
            f"{clients} {'streamed' if stream else 'whole'}": {
                name: round(_median(of, "requests_per_s"), 1) for name, of in sides.items()
            }
            for (clients, stream), sides in runs.items()
        },
        "telemetry": TELEMETRY,
    }


def _ratio(runs: dict[str, list[Run]], over: str, under: str) -> float:
    pairs = zip(runs[over], runs[under], strict=True)
    return statistics.median(a.requests_per_s / b.requests_per_s for a, b in pairs)


def _added_ms(runs: dict[str, list[Run]], what: str, over: str) -> float:
    return round(1000 * (_median(runs["mesh"], what) - _median(runs[over], what)), 2)


def _median(runs: Sequence[Run], what: str) -> float:
    return statistics.median(float(getattr(run, what)) for run in runs)


if __name__ == "__main__":
    main()
