"""A mesh that says what a test tells it to, behind the real admin routes, event stream, page and walls."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from fastapi import FastAPI

from expertmesh.platform.config import IngressConfig
from tests.support.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from ray.serve.handle import DeploymentHandle

    from expertmesh.deployments.controller.events import Kind, Timeline
    from expertmesh.deployments.ingress.access import add_walls
    from expertmesh.deployments.ingress.admin import admin_routes
    from expertmesh.deployments.ingress.console import console_routes
    from expertmesh.deployments.ingress.event_stream import event_routes

NODE = "c0ffee" + "5" * 50


class ScriptedMesh:
    """In the place of a Serve handle of the controller. Change its fields; the page sees it at the next look."""

    def __init__(self, layers: int, experts: int, shards: int, seed: int = 0) -> None:
        """Experts of `shards` in turn, loads that are skewed as a router's are, 10 minutes of history."""
        self.random = np.random.default_rng(seed)
        self.layers, self.experts, self.shards = list(range(1, layers + 1)), experts, shards
        self.present = set(range(shards))
        self.epoch = 3_000_000
        self.health = "ok"
        self.ready = True
        self.moves: list[str] = []
        self.rows = np.round(self.random.gamma(0.8, 40, (layers, experts)), 1)
        self.rows[layers // 2, experts // 3] = 6 * self.rows.max()
        self.timeline = Timeline(3, time.time)
        self.timeline.add(Kind.OFFICE, "the controller of term 3 takes office", term=3)
        self.away = False
        self.asked: list[str] = []
        self.samples = [self.sample(time.time() - 2 * (300 - i), i) for i in range(300)]

    def __getattr__(self, method: str) -> Any:
        """`.method.remote()` as of a Serve handle."""
        answer = object.__getattribute__(self, f"answer_{method}")

        async def remote(*arguments: Any) -> Any:
            self.asked.append(method)
            if self.away:
                raise RuntimeError("the controller is away")
            return await answer(*arguments)

        return SimpleNamespace(remote=remote)

    @property
    def slots(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[shards, layers, slots] each expert on one shard."""
        per = -(-self.experts // self.shards)
        slots = np.full((self.shards, len(self.layers), per), -1, dtype=np.int32)
        for expert in range(self.experts):
            slots[expert % self.shards, :, expert // self.shards] = expert
        return slots

    def name(self, index: int) -> str:
        """Id of a shard."""
        return f"{0xE277E7D92BA3 + 7919 * index:012x}"

    def lose(self, index: int) -> None:
        """A shard is gone, and its experts with it."""
        self.present.discard(index)
        self.epoch += 1
        self.health = "degraded"
        text = f"shard {self.name(index)} is lost: not heard of in time"
        self.timeline.add(Kind.SHARD_LOST, text, shard=self.name(index), index=index)

    async def answer_status(self) -> dict[str, Any]:
        """As the controller's."""
        held = (self.slots >= 0).sum(axis=(1, 2))
        missing = sum(int(held[i]) for i in range(self.shards) if i not in self.present)
        replica = {"replica": "z6k2p9qa", "node": NODE, "ready": self.ready, "epoch": self.epoch, "running": 12}
        load = {"waiting": 2, "kv_use": 0.43, "ttft_s": 0.212}
        shard = {"node": NODE, "ready": True, "leaving": False, "addresses": [], "seen_s": 0.4}
        return {
            "model": "synthetic",
            "mode": "mesh",
            "health": self.health,
            "revision": "0123456789abcdef",
            "placement": {
                "epoch": self.epoch,
                "layers": len(self.layers),
                "experts": self.experts,
                "redundancy": 0 if missing else 1,
                "missing_experts": missing,
                "balancedness": 0.91,
                "moves": len(self.moves),
                "frozen": False,
            },
            "attention": [{**replica, "seen_s": 0.2, "load": load}],
            "shards": [
                {"shard": self.name(i), "index": i, "experts": int(held[i]), **shard} for i in sorted(self.present)
            ],
            "wanted": {"attention": 1, "experts": self.shards},
        }

    async def answer_placement(self) -> dict[str, Any]:
        """As the controller's."""
        return {
            "epoch": self.epoch,
            "layers": self.layers,
            "experts": self.experts,
            "shards": {str(i): self.name(i) for i in sorted(self.present)},
            "slots": self.slots.tolist(),
            "frozen": False,
            "running": self.moves,
            "ended": [],
        }

    async def answer_loads(self) -> dict[str, Any]:
        """As the controller's."""
        tokens = (100 * self.rows).astype(int).tolist()
        return {"layers": self.layers, "tokens": tokens, "rows_a_second": self.rows.tolist(), "by_shard": {}}

    async def answer_heat(self) -> dict[str, Any]:
        """As the controller's."""
        return {"layers": self.layers, "experts": self.experts, "rows_a_second": self.rows.tolist()}

    async def answer_history(self, after: float) -> dict[str, Any]:
        """As the controller's, with a new sample every 2 s."""
        if time.time() - self.samples[-1]["at"] >= 2:
            self.samples.append(self.sample(time.time(), len(self.samples)))
        return {
            "interval_s": 2.0,
            "samples": [sample for sample in self.samples if sample["at"] > after],
            "shards": {self.name(i): {"busy": 0.2 + 0.04 * i % 0.8, "rows_s": 900.0 + 30 * i} for i in self.present},
            "attention": {"z6k2p9qa": {"tokens_s": 212.5, "kv_hits": 0.38, "itl_s": 0.041}},
        }

    async def answer_events(self, after: int, wait_s: float) -> list[dict[str, Any]]:
        """As the controller's; looks ten times a second."""
        deadline = time.monotonic() + wait_s
        while not (told := self.timeline.after(after)) and time.monotonic() < deadline and not self.away:
            await asyncio.sleep(0.1)
        return [event.to_dict() for event in told]

    def sample(self, at: float, number: int) -> dict[str, Any]:
        wave, noise = np.sin(number / 24), self.random.normal()
        return {
            "at": round(at, 3),
            "attention": 1,
            "shards": len(self.present),
            "running": 12,
            "waiting": 2,
            "requests_s": 3.1,
            "tokens_s": round(210 + 60 * wave + 9 * noise, 2),
            "prompt_tokens_s": 820.0,
            "kv_hits": round(0.38 + 0.08 * wave + 0.01 * noise, 4),
            "kv_fetched": 0.1,
            "kv_use": 0.43,
            "ttft_s": round(0.212 + 0.05 * wave + 0.012 * abs(noise), 4),
            "itl_s": round(0.041 + 0.004 * wave + 0.001 * noise, 4),
            "rows_s": 14_800.0,
            "busy": 0.52,
            "balancedness": round(min(1.0, 0.9 + 0.05 * wave + 0.01 * noise), 4),
        }


@contextmanager
def scripted(mesh: ScriptedMesh, **ingress: Any) -> Iterator[str]:
    """Its URL; ingress: fields of the config."""
    controller, app = cast("DeploymentHandle[Any]", mesh), FastAPI()
    app.include_router(admin_routes(controller))
    app.include_router(event_routes(controller, heartbeat_s=0.5))
    app.include_router(console_routes())
    add_walls(app, IngressConfig(**ingress))
    with served(app) as url:
        yield url
