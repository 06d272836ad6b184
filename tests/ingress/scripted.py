"""A real ingress on a real Ray, over attention replicas that follow a script instead of a model.

What a replica says is a function of the tokens so far, as an engine's greedy answer is, so that another replica goes on
where it ended. What happens to it on the way is told attempt by attempt.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.deployments.runtime import mesh_secret, node_id
from expertmesh.deployments.source import Source
from expertmesh.deployments.tokens.outbox import Outboxes
from expertmesh.errors import Unavailable
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.vllm_plugin import UNAVAILABLE

PROMPT = [40, 77, 301]
TEXT = "Ein 😀 und 漢字: naïve 👩‍👩‍👧 end."
REPLICAS = 2
DRAIN_S = 3.0
"""How long a replica that is told to stop may go on."""
_SIGN_OF_LIFE_S = 0.5
_APP = "scripted"


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one attempt, after it has given `after` tokens of its own."""

    ends: str = "well"
    """`well`, `killed`, `engine dead`, `silent`, `hangs`, `abort`, `error`, `no experts`, `diverges`, `waits`,
    or `refuses` before its first token."""
    after: int = 0


class Director:
    """Tells each attempt its fate, and keeps what was asked of the replicas."""

    def __init__(self) -> None:
        self._fates: deque[Fate] = deque()
        self._always = Fate()
        self._go_on = asyncio.Event()
        self.attempts: list[tuple[int, int, int | None, int]] = []
        self.asked: set[str] = set()
        self.cancelled = 0

    async def stage(self, fates: list[Fate], always: Fate) -> None:
        """The fates of the next attempts, in turn, and that of all after them. Forgets what was."""
        self._fates, self._always = deque(fates), always
        self.attempts, self.asked, self.cancelled = [], set(), 0
        self._go_on.clear()

    async def fate(self, replica: str, attempt: tuple[int, int, int | None, int]) -> Fate:
        """Of an attempt at a replica: prompt tokens, tokens to force, max_tokens, min_tokens."""
        self.attempts.append(attempt)
        self.asked.add(replica)
        return self._fates.popleft() if self._fates else self._always

    async def release(self) -> None:
        """Lets those go on that wait."""
        self._go_on.set()

    async def released(self) -> None:
        """Returns once `release` is called."""
        await self._go_on.wait()

    async def was_cancelled(self) -> None:
        """An attempt was stopped by its caller."""
        self.cancelled += 1

    async def seen(self) -> tuple[list[tuple[int, int, int | None, int]], int, int]:
        """Attempts so far, how many were cancelled, and how many replicas they were at."""
        return self.attempts, self.cancelled, len(self.asked)


class ScriptedReplica:
    """Says TEXT, token by token."""

    def __init__(self, director: Any, config: MeshConfig, script: list[int], eos: int) -> None:
        from ray import serve
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.engine.exceptions import EngineDeadError

        self._id = serve.get_replica_context().replica_id.unique_id
        self._director = director
        self._script = [*script, eos]
        self._output, self._reasons, self._dead = EngineCoreOutput, FinishReason, EngineDeadError
        self._outboxes = Outboxes(node_id(), mesh_secret(config), config.routing.connect_timeout_s)

    async def generate(self, request: Any, inbox: Source) -> None:
        """As AttentionReplica.generate."""
        fate = await self._fate_of(request)
        outbox = await self._outboxes.to(inbox)
        async with aclosing(self._said(request, fate)) as said:
            async for outputs in said:
                outbox.put(request.request_id, outputs)
                while outbox.pending:  # what is said before a replica is killed is heard
                    await asyncio.sleep(0)
        outbox.end(request.request_id)

    async def _fate_of(self, request: Any) -> Fate:
        params = request.sampling_params
        forced = params.trace_decode_token_ids or []
        attempt = (len(request.prompt_token_ids), len(forced), params.max_tokens, params.min_tokens)
        fate: Fate = await self._director.fate.remote(self._id, attempt)
        if fate.ends == "refuses":
            raise Unavailable("this replica has no engine any more")
        return fate

    async def _said(self, request: Any, fate: Fate) -> AsyncGenerator[list[Any]]:
        params = request.sampling_params
        first = len(request.prompt_token_ids) - len(PROMPT)
        count = min(len(self._script) - first, params.max_tokens)
        given = 0
        try:
            yield []
            while True:
                if fate.ends == "waits" and given == fate.after:
                    released = asyncio.wrap_future(self._director.released.remote().future())
                    while not (await asyncio.wait({released}, timeout=_SIGN_OF_LIFE_S))[0]:
                        yield []
                if given == fate.after:
                    if fate.ends == "killed":
                        os._exit(1)
                    if fate.ends == "engine dead":
                        raise self._dead
                    if fate.ends == "silent":
                        return
                    if fate.ends == "hangs":
                        await asyncio.Event().wait()
                    if fate.ends in ("abort", "error", "no experts"):
                        reason = self._reasons.ABORT if fate.ends == "abort" else self._reasons.ERROR
                        why = f"{UNAVAILABLE}layer 1" if fate.ends == "no experts" else None
                        yield [self._output(request.request_id, [], finish_reason=reason, stop_reason=why)]
                        return
                position = first + given
                token = self._script[position]
                if fate.ends == "diverges" and given == 1:
                    token += 1
                reason = self._reasons.STOP if position == len(self._script) - 1 else None
                if reason is None and given == count - 1:
                    reason = self._reasons.LENGTH
                yield [self._output(request.request_id, [token], finish_reason=reason)]
                given += 1
                if reason is not None:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self._director.was_cancelled.remote()
            raise


class Controller:
    """What the ingress asks of the mesh's controller."""

    async def status(self) -> dict[str, Any]:
        """Healthy."""
        return {"health": "ok"}


class IngressHost:
    """Ray, Serve and the application; to be run by a benchmarks.bare.Worker. Answers when it serves."""

    def __init__(
        self,
        folder: Path,
        port: int,
        ingress: dict[str, Any],
        attention: dict[str, Any],
        telemetry: dict[str, Any],
    ) -> None:
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions
        from transformers import AutoTokenizer

        from expertmesh.deployments.ingress.deployment import Ingress
        from expertmesh.platform.config import load_config

        config = load_config(
            {
                "model": folder,
                "experts": {"mode": "colocated"},
                "ingress": {"port": port, **ingress},
                "attention": attention,
                "telemetry": telemetry,
            }
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        script = tokenizer.encode(TEXT, add_special_tokens=False)
        self._folder = tempfile.TemporaryDirectory(prefix="xm-", ignore_cleanup_errors=True)
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _temp_dir=self._folder.name,
        )
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        self._director: Any = ray.remote(Director).options(max_concurrency=1000, num_cpus=0).remote()
        attention = serve.deployment(
            name="attention",
            num_replicas=REPLICAS,
            max_ongoing_requests=100,
            health_check_period_s=1,
            graceful_shutdown_timeout_s=DRAIN_S,
        )(ScriptedReplica).bind(self._director, config, script, tokenizer.eos_token_id)
        controller = serve.deployment(name="controller")(Controller).bind()
        ingress = serve.deployment(name="ingress", max_ongoing_requests=100)(Ingress)
        serve.run(ingress.bind(config, attention, controller), name=_APP, external_scaler_enabled=True)

    def scale(self, replicas: int) -> None:
        """Has Serve serve with this many attention replicas, some time from now."""
        import ray
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        serve_controller: Any = _get_global_client()._controller
        ray.get(serve_controller.update_deployment_replicas.remote(DeploymentID("attention", _APP), replicas))

    def stage(self, fates: list[Fate], always: Fate) -> None:
        """See Director."""
        import ray

        ray.get(self._director.stage.remote(fates, always))

    def release(self) -> None:
        """See Director."""
        import ray

        ray.get(self._director.release.remote())

    def seen(self) -> tuple[list[tuple[int, int, int | None, int]], int, int]:
        """See Director."""
        import ray

        seen: tuple[list[tuple[int, int, int | None, int]], int, int] = ray.get(self._director.seen.remote())
        return seen

    def logs(self) -> str:
        """What the ingress logged so far, on standard error and in Serve's file."""
        folder = Path(self._folder.name)
        files = (*folder.glob("session_*/logs/worker-*.err"), *folder.glob("session_*/logs/serve/replica_*ingress*"))
        once = {file.resolve() for file in files}  # Ray links the latest session
        return "".join(file.read_text(errors="replace") for file in once)

    def close(self) -> None:
        """Ends Ray."""
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._folder.cleanup()
