"""What does a start from S3 cost: for a shard, for an attention engine, and for a download of the whole checkpoint?

    python -m benchmarks.cold_start [--quick]

A float32 Qwen3-MoE is written, cut into files of 32 MB and pushed to moto's S3 on this machine. Then, each with an
empty cache and a proxy of its own that counts what S3 sends: the whole checkpoint is downloaded; four shards, one after
the other, build vLLM's modules and load a quarter of the experts; an attention engine starts with our load format. All
three are the product's own code. Seconds go from listing the bucket to a part that could serve (for the download: to
files on the disk), without the time that Python takes to import vLLM. moto copies 32 MB for each range and the proxies
are Python too, so seconds here say little about S3; bytes are exact: `bytes_ratio` is all that S3 sent to a shard
(listing, small files and headers included) over the bytes of its experts, the worst of the four, and `expert_bytes` the
bytes of experts' tensors in the ranges that the engine asked for. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bare import BareMesh, EngineHost, Worker, engine_arguments, engine_environment
from benchmarks.checkpoints import write_medium_moe
from benchmarks.s3 import CREDENTIALS, Proxy, s3_client, s3_service
from expertmesh.platform.checkpoints import (
    Checkpoint,
    check_checkpoint,
    expert_layout,
    is_expert_tensor,
    open_checkpoint,
)
from expertmesh.platform.weights.mirror import mirror
from expertmesh.platform.weights.push import push
from expertmesh.platform.weights.s3 import S3Settings
from expertmesh.platform.weights.s3_location import S3Location
from expertmesh.platform.weights.whole import download
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.vllm_plugin.loader import REPORT_NAME

SHARDS = 4
LOCATION = S3Location("weights", "cold-start")
FILE_BYTES = 32 << 20
QUICK_SIZES = {"layers": 4, "experts": 16, "hidden": 512, "expert_inner": 256, "vocab": 4096}

Phases = dict[str, float]
"""Seconds by what they were spent on."""


class ColdShard:
    """An ExpertBank that is built from S3; to be run by a Worker."""

    def __init__(self, url: str, cache: Path, slots: IntArray) -> None:
        engine_environment(1)
        from expertmesh.deployments.experts.bank import ExpertBank

        begin = time.monotonic()
        model = mirror(LOCATION, S3Settings(endpoint_url=url), cache)
        listed = time.monotonic()
        checkpoint = open_checkpoint(model)
        opened = time.monotonic()
        self._bank = ExpertBank(checkpoint, expert_layout(checkpoint), slots, "float32")
        built = time.monotonic() - opened
        self._phases = {
            "small files, headers": listed - begin,
            "opening": opened - listed,
            "waiting for tensors": checkpoint.waited_s,
            "building, copying": built - checkpoint.waited_s,
        }

    def phases(self) -> Phases:
        """How long its start took."""
        return self._phases

    def close(self) -> None:
        """Leaves vLLM's context."""
        self._bank.close()


class ColdEngine(EngineHost):
    """An attention engine; to be run by a Worker."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        engine_environment(1)
        import vllm  # noqa: F401 (its time doesn't count)

        begin = time.monotonic()
        super().__init__(arguments, 1)
        self._seconds = time.monotonic() - begin

    def seconds(self) -> float:
        """How long its start took."""
        return self._seconds


def cut_into_files(folder: Path, longest: int) -> None:
    """Replaces a checkpoint's single file by several of at most `longest` bytes of tensors each, and an index."""
    from safetensors.torch import load_file, save_file

    single = folder / "model.safetensors"
    groups: list[dict[str, Any]] = [{}]
    room = longest
    for name, tensor in load_file(single).items():
        if tensor.nbytes > room:
            groups.append({})
            room = longest
        groups[-1][name] = tensor
        room -= tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, folder / file)
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    single.unlink()


def bytes_asked_for(proxy: Proxy, checkpoint: Checkpoint, counts: Callable[[str], bool]) -> int:
    """Bytes of the tensors whose name `counts` in the ranges that were asked for; what was asked twice counts twice."""
    files: dict[str, list[tuple[int, int]]] = {}
    for name, info in checkpoint.tensors.items():
        if counts(name):
            files.setdefault(info.file.name, []).append((info.offset, info.offset + info.nbytes))
    total = 0
    for asked in proxy.asked:
        if asked.range:
            first, last = map(int, asked.range.removeprefix("bytes=").split("-"))
            spans = files.get(asked.path.rpartition("/")[2], ())
            total += sum(max(0, min(last + 1, end) - max(first, begin)) for begin, end in spans)
    return total


def shard(service: str, scratch: Path, slots: IntArray) -> tuple[int, Phases]:
    """What S3 sent to one shard with these slots [layers, slots], and how long its start took."""
    with counting(service) as proxy:
        with Worker(ColdShard, proxy.url, scratch, slots) as host:
            phases: Phases = host.ask("phases")
        return sum(proxy.sent.values()), phases


def attention(service: str, scratch: Path) -> tuple[int, int, Phases]:
    """What S3 sent to an attention engine, how much of it was experts', and how long its start took."""
    with counting(service) as proxy:
        begin = time.monotonic()
        model = mirror(LOCATION, S3Settings(endpoint_url=proxy.url), scratch / "cache")
        listed = time.monotonic() - begin
        mesh = BareMesh(model, scratch)
        try:
            with Worker(ColdEngine, {**engine_arguments(model), **mesh.engine_arguments()}) as engine:
                seconds = engine.ask("seconds")
            report = json.loads((mesh.mailbox.folder / REPORT_NAME).read_text())
        finally:
            mesh.mailbox.close()
        phases = {
            "small files, headers": listed,
            "waiting for tensors": report["waited_s"],
            "building, copying": report["seconds"] - report["waited_s"],
            "the rest of vLLM's start": seconds - report["seconds"],
        }
        experts = bytes_asked_for(proxy, open_checkpoint(model), is_expert_tensor)
        return sum(proxy.sent.values()), experts, phases


def whole(service: str, scratch: Path) -> tuple[int, float]:
    """What S3 sent for the whole checkpoint, and how long that took."""
    with counting(service) as proxy:
        begin = time.monotonic()
        download(mirror(LOCATION, S3Settings(endpoint_url=proxy.url), scratch))
        return sum(proxy.sent.values()), time.monotonic() - begin


@contextmanager
def counting(service: str) -> Iterator[Proxy]:
    """A proxy before `service`."""
    proxy = Proxy(service)
    try:
        yield proxy
    finally:
        proxy.stop()


def shares(phases: Phases) -> str:
    """The share of each phase, in words."""
    total = sum(phases.values())
    return ", ".join(f"{what} {spent:.1f} s ({spent / total:.0%})" for what, spent in phases.items())


def measure(scratch: Path, sizes: Mapping[str, int], show: Callable[[str], None]) -> dict[str, Any]:
    """The figures of the module's text; `show` gets bytes and the share of time by phase as lines of text."""
    os.environ.update(CREDENTIALS)
    folder = write_medium_moe(scratch / "model", **sizes)
    cut_into_files(folder, FILE_BYTES)
    checkpoint = check_checkpoint(folder)
    layout = expert_layout(checkpoint)
    ids = np.arange(layout.num_experts, dtype=np.int32).reshape(SHARDS, -1)
    with s3_service() as service:
        s3_client(service).create_bucket(Bucket=LOCATION.bucket)
        push(folder, [f.path.name for f in checkpoint.files], LOCATION, S3Settings(endpoint_url=service))
        whole_bytes, whole_s = whole(service, scratch / "whole")
        show(f"whole: {whole_bytes} bytes, {whole_s:.1f} s")
        ratios, starts = [], []
        for number, held in enumerate(ids):
            slots = np.tile(held, (len(layout.layers), 1))
            sent, phases = shard(service, scratch / f"shard-{number}", slots)
            ratios.append(sent / sum(layout.expert_bytes(layer, e) for layer in layout.layers for e in held.tolist()))
            starts.append(phases)
            show(f"shard {number}: {sent} bytes, {shares(phases)}")
        attention_bytes, expert_bytes, engine_start = attention(service, scratch)
        show(f"attention: {attention_bytes} bytes, {shares(engine_start)}")
    slowest = max(starts, key=lambda phases: sum(phases.values()))
    return {
        "attention": {
            "expert_bytes": expert_bytes,
            "bytes": attention_bytes,
            "seconds": round(sum(engine_start.values()), 2),
        },
        "shard": {"bytes_ratio": round(max(ratios), 4), "seconds": round(sum(slowest.values()), 2)},
        "whole": {"bytes": whole_bytes, "seconds": round(whole_s, 2)},
    }


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a model of about 0.1 GB instead of 1 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cold-start-") as scratch:
        sizes = QUICK_SIZES if options.quick else {}
        print(json.dumps(measure(Path(scratch), sizes, lambda line: print(line, flush=True))))


if __name__ == "__main__":
    main()
