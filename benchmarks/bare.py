"""The mesh without Ray, for benchmarks and tests of its engine side: shards as plain processes, one engine beside them.

The shard (deployments.experts.shard), the wire and the plugin are the product's own; only membership is static.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.routing.dispatch import Mailbox
from expertmesh.routing.placement import Target, build_table, even_slots
from expertmesh.routing.vllm_plugin import LOAD_FORMAT, MeshSettings, Role

CPU_ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet_engine_environment(threads: int) -> None:
    """Sets what a vLLM process on CPU reads at import, and its number of threads; for processes started after it too."""
    os.environ.update(CPU_ENGINE_ENVIRONMENT, OMP_NUM_THREADS=str(threads))


def _serve_shard(
    folder: Path, index: int, slots: Any, dtype: str, threads: int, secret: bytes, pipe: Connection
) -> None:
    quiet_engine_environment(threads)
    from expertmesh.deployments.experts.shard import Shard, ShardSettings

    shard = Shard(ShardSettings(folder, dtype, threads, transport="unix"), secret, slots[index])
    shard.start()
    pipe.send((shard.shard_id, tuple(shard.addresses), shard.bytes_read))
    while pipe.poll(None):
        try:
            question = pipe.recv()
        except EOFError:
            break
        if question == "stop":
            break
        pipe.send(asdict(shard.stats))
    shard.stop()


class BareMesh:
    """Running shards and what an engine needs to use them."""

    def __init__(
        self,
        folder: Path,
        pipes: list[Connection],
        mailbox: Mailbox,
        secret_file: Path,
        targets: dict[int, Target],
        slots: Any,
        bytes_read: list[int],
    ) -> None:
        checkpoint = open_checkpoint(folder)
        layout = expert_layout(checkpoint)
        self._pipes = pipes
        self.mailbox = mailbox
        self.bytes_read = bytes_read
        """Tensor bytes that each shard read."""
        self.settings = MeshSettings(
            Role.ATTENTION,
            str(mailbox.folder),
            str(secret_file),
            layout.layers,
            layout.num_experts,
            {"node": "here", "revision": checkpoint_revision(checkpoint)},
        )
        mailbox.publish(build_table(1, layout.layers, layout.num_experts, slots, targets))

    def engine_arguments(self) -> dict[str, Any]:
        """To be added to those of a monolithic engine."""
        return {"load_format": LOAD_FORMAT, "additional_config": self.settings.to_additional_config()}

    def stats(self) -> list[Mapping[str, Any]]:
        """ServerStats of each shard as a dict."""
        for pipe in self._pipes:
            pipe.send("stats")
        return [pipe.recv() for pipe in self._pipes]


@contextmanager
def bare_mesh(
    folder: Path,
    shards: int,
    redundancy: int = 1,
    dtype: str = "float32",
    threads: int = 1,
    swapped: Path | None = None,
) -> Iterator[BareMesh]:
    """Shards as processes; they end with the block. `swapped`: a checkpoint that shard 0 loads instead (negative control)."""
    checkpoint = open_checkpoint(folder)
    layout = expert_layout(checkpoint)
    slots = even_slots(len(layout.layers), layout.num_experts, shards, redundancy)
    context = mp.get_context("spawn")
    secret = secrets.token_hex(16).encode()
    mailbox = Mailbox.create()
    processes, pipes = [], []
    try:
        with tempfile.TemporaryDirectory(prefix="expertmesh-") as scratch:
            secret_file = Path(scratch) / "secret"
            secret_file.write_bytes(secret)
            for index in range(shards):
                mine, theirs = context.Pipe()
                source = swapped if swapped is not None and index == 0 else folder
                process = context.Process(
                    target=_serve_shard, args=(source, index, slots, dtype, threads, secret, theirs), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(mine)
            hello = [pipe.recv() for pipe in pipes]
            targets = {i: Target(shard, "here", addresses) for i, (shard, addresses, _) in enumerate(hello)}
            yield BareMesh(folder, pipes, mailbox, secret_file, targets, slots, [read for _, _, read in hello])
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        mailbox.close()
