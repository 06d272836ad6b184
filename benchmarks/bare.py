"""The mesh without Ray, for benchmarks and tests of its engine side: shards and engines as plain processes.

The shard (deployments.experts.shard), the wire, the plugin and the engine's arguments are the product's own; only
membership is static here.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.routing.dispatch import Mailbox
from expertmesh.routing.placement import Target, build_table, even_slots
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.vllm_plugin import CPU_EXECUTOR, LOAD_FORMAT, SCHEDULER, MeshSettings, Role

_NODE = "here"


def engine_environment(threads: int) -> None:
    """Sets what a vLLM process on CPU reads at import, for this process and those below it."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )


class Worker:
    """A process that answers questions over a pipe with the methods of an object that it builds. Ends with `close`."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        """Starts the process; `build(*arguments)` runs there. Returns at once: the first `ask` waits for it."""
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: an engine starts processes of its own.
        self._process = context.Process(target=_work, args=(theirs, build, arguments))
        self._process.start()
        theirs.close()

    def post(self, method: str, *arguments: Any) -> None:
        """Asks without waiting; `take` gets the answer."""
        self._pipe.send((method, arguments))

    def take(self) -> Any:
        """The answer to the oldest question. Raises what the method raised, EOFError if the process ended."""
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def ask(self, method: str, *arguments: Any) -> Any:
        """`post` and `take`."""
        self.post(method, *arguments)
        return self.take()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def close(self) -> None:
        """Ends the process and waits for it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(pipe: Connection, build: Callable[..., Any], arguments: Sequence[Any]) -> None:
    subject = None
    with contextlib.suppress(EOFError, OSError):
        try:
            subject = build(*arguments)
        except Exception as error:
            pipe.recv()
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
            return
        while (question := pipe.recv()) is not None:
            method, values = question
            try:
                pipe.send(getattr(subject, method)(*values))
            except Exception as error:
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
    if subject is not None:
        subject.close()


class ShardHost:
    """Shards in one process; to be run by a Worker."""

    def __init__(self, secret: bytes, dtype: str, threads: int) -> None:
        engine_environment(threads)
        self._secret = secret
        self._dtype = dtype
        self._threads = threads
        self._shards: list[Any] = []

    def load(self, folder: Path, slots: IntArray, claim: Path | None = None) -> Target:
        """Loads and serves one more shard; slots: [layers, slots] expert ids.

        claim: the checkpoint that it says it serves, where that is a lie (negative controls).
        """
        from expertmesh.deployments.experts.shard import Shard, ShardSettings

        revision = None if claim is None else checkpoint_revision(open_checkpoint(claim))
        settings = ShardSettings(folder, self._dtype, self._threads, transport="unix")
        shard = Shard(settings, self._secret, slots, revision=revision)
        shard.start()
        self._shards.append(shard)
        return Target(shard.shard_id, _NODE, tuple(shard.addresses))

    def stats(self) -> list[dict[str, Any]]:
        """ServerStats and `bytes_read` of each shard."""
        return [{**asdict(shard.stats), "bytes_read": shard.bytes_read} for shard in self._shards]

    def close(self) -> None:
        """Stops the shards."""
        for shard in self._shards:
            shard.stop()


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine said to one prompt."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the chosen tokens."""
    runner_up: tuple[tuple[int, float], ...]
    """Token and log-probability of the best one that was not chosen, at each position."""
    finish_reason: str
    seconds: float
    """From sending all prompts of the batch until the last token of the last one."""


class EngineHost:
    """A vLLM engine; to be run by a Worker."""

    def __init__(self, arguments: dict[str, Any], threads: int) -> None:
        engine_environment(threads)
        from vllm import LLM

        self._llm = LLM(**arguments)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, logprobs: bool = True) -> list[Answer]:
        """Greedy answers of exactly `max_tokens` tokens to prompts of token ids, as one batch."""
        import time

        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1 if logprobs else None
        )
        begin = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return [_answer(output.outputs[0], seconds) for output in outputs]

    def close(self) -> None:
        """Ends the engine's processes."""
        del self._llm


def _answer(output: Any, seconds: float) -> Answer:
    tokens, reason = tuple(output.token_ids), str(output.finish_reason)
    if output.logprobs is None:
        return Answer(tokens, (), (), reason, seconds)
    chosen = tuple(at[token].logprob for token, at in zip(tokens, output.logprobs, strict=True))
    others = tuple(
        max(
            ((i, p.logprob) for i, p in at.items() if i != token), key=lambda pair: pair[1], default=(-1, float("-inf"))
        )
        for token, at in zip(tokens, output.logprobs, strict=True)
    )
    return Answer(tokens, chosen, others, reason, seconds)


def engine_arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a monolithic engine for small models on CPU."""
    return {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        **changes,
    }


class BareMesh:
    """The engine's side of a mesh: a mailbox, a secret, and shards that come and go by `publish`."""

    def __init__(self, folder: Path, scratch: Path, **dispatch: Any) -> None:
        """dispatch: DispatchSettings that are not the defaults."""
        checkpoint = open_checkpoint(folder)
        layout = expert_layout(checkpoint)
        self.folder = folder
        self.layers, self.num_experts = layout.layers, layout.num_experts
        self.secret = secrets.token_hex(16).encode()
        secret_file = scratch / "secret"
        secret_file.write_bytes(self.secret)
        self.mailbox = Mailbox.create()
        self.settings = MeshSettings(
            Role.ATTENTION,
            str(self.mailbox.folder),
            str(secret_file),
            layout.layers,
            layout.num_experts,
            dispatch={"node": _NODE, "revision": checkpoint_revision(checkpoint), **dispatch},
        )
        self._epoch = 0
        self.targets: Sequence[Target] = ()
        """Of the last `publish`."""

    def engine_arguments(self) -> dict[str, Any]:
        """To be added to those of a monolithic engine."""
        return {
            "distributed_executor_backend": CPU_EXECUTOR,
            "load_format": LOAD_FORMAT,
            "scheduler_cls": SCHEDULER,
            "additional_config": self.settings.to_additional_config(),
        }

    def even_slots(self, shards: int, redundancy: int) -> IntArray:
        """[shards, layers, slots] for this model."""
        return even_slots(len(self.layers), self.num_experts, shards, redundancy)

    def publish(self, slots: IntArray, targets: Sequence[Target]) -> None:
        """Makes these shards the placement, as the next epoch; in force from the engine's next layer on."""
        self._epoch += 1
        self.targets = targets
        table = build_table(self._epoch, self.layers, self.num_experts, slots, dict(enumerate(targets)))
        self.mailbox.publish(table)


@contextmanager
def bare_mesh(
    folder: Path, shards: int, redundancy: int = 1, dtype: str = "float32", threads: int = 1, **dispatch: Any
) -> Iterator[tuple[BareMesh, list[Worker]]]:
    """A placement of `shards` processes, one shard each, that serve; gone after the block."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-")))
        mesh = BareMesh(folder, scratch, **dispatch)
        stack.callback(mesh.mailbox.close)
        hosts = [stack.enter_context(Worker(ShardHost, mesh.secret, dtype, threads)) for _ in range(shards)]
        slots = mesh.even_slots(shards, redundancy)
        for host, held in zip(hosts, slots, strict=True):
            host.post("load", folder, held)
        mesh.publish(slots, [host.take() for host in hosts])
        yield mesh, hosts
