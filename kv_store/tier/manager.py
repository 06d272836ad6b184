"""The store as a secondary tier of vLLM's offloading: host memory above it, the servers below."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from expertmesh.kv_store.client import StoreClient
from expertmesh.kv_store.keys import Identity, Keyspace
from expertmesh.kv_store.store import Block, BlockStore
from expertmesh.kv_store.tier.report import Reporter
from expertmesh.kv_store.tier.settings import TierSettings

logger = init_logger("vllm.expertmesh.kv_store")

_LOAD_THREADS = 4
"""Requests that load at once; more wait."""
_WRITE_BYTES = 8 << 20
"""A request's blocks are offered for writing in pieces of about this size, each taken or dropped."""


@dataclass(frozen=True, slots=True)
class _Tenant:
    name: str


@dataclass(frozen=True, slots=True)
class _Offer:
    """What the store has of a request's prefix."""

    tokens: int


class _Lookups(AsyncLookupManager):
    """vLLM's bookkeeping of lookups: one batch a request and step, asked in a thread of its own."""

    def __init__(self, tier_type: str, find: Callable[[Sequence[OffloadKey], ReqContext], list[bool]]) -> None:
        self._find = find
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        return self._find(keys, req_context)


class _Writing:
    """A job whose pieces are written one by one. `finish` gets the result, in any thread, when the last one is done."""

    def __init__(self, job: TransferJob, pieces: int, finish: Callable[[JobResult], None]) -> None:
        self._job = job
        self._left = pieces
        self._sound = True
        self._lock = threading.Lock()
        self._finish = finish

    def done(self, written: Collection[bool]) -> None:
        with self._lock:
            self._sound = self._sound and all(written)
            self._left -= 1
            last = self._left == 0
        if last:
            self._finish(JobResult(self._job.job_id, self._sound))


class KVStoreTier(SecondaryTierManager):
    """Runs in the scheduler's process; nothing of it waits for a server in the scheduler's thread.

    A lookup that misses its deadline, a server that failed a moment ago and a fetch that isn't worth it are all misses.
    Loads that fail are marked as misses too, so that vLLM computes the blocks instead of asking again. Host memory that
    a job names belongs to the tier until the job is among `get_finished_jobs`.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE
    cache_hit_source: ClassVar[CacheHitSource] = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        *,
        settings_file: str,
        model: str,
    ) -> None:
        """settings_file: TierSettings; model: digest of what the engine makes of the checkpoint."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality.REMOTE
        settings = TierSettings.load(Path(settings_file))
        self._chunk_tokens = {
            group.group_id: group.tokens_per_block * offloading_spec.blocks_per_chunk
            for group in offloading_spec.config.groups
        }
        identity = identity_of(offloading_spec, f"{settings.weights} {model}", self._block_size_bytes)
        self._client = StoreClient(settings.server)
        self._events: queue.SimpleQueue[OffloadingEvent] = queue.SimpleQueue()
        keyspace = Keyspace(identity, settings.secret.encode())
        heard = self._tell if offloading_spec.kv_events_config.enable_kv_cache_events else None
        self._store = BlockStore(self._client, keyspace, settings.limits, heard)
        self._memory = primary_kv_view.cast("B")
        self._loaders = ThreadPoolExecutor(_LOAD_THREADS, "kv-store-load")
        self._lookups = _Lookups(tier_type, self._find)
        self._tenants: dict[str, str] = {}
        self._loading: dict[int, Collection[OffloadKey]] = {}
        self._finished: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
        self._jobs = 0
        self._jobs_changed = threading.Condition()
        self._reporter = Reporter(settings.report_file, self._report) if settings.report_file is not None else None
        logger.info("KV store %s, blocks of %d bytes, %s", settings.server.endpoint, self._block_size_bytes, identity)

    def admit(self, request: str, tenant: str) -> None:
        """Tells whose request the next `on_new_request` of that id is."""
        self._tenants[request] = tenant

    def computed(self, tokens: int, seconds: float) -> None:
        """Tells what computing a prompt of that many tokens took."""
        self._store.computed(tokens, seconds)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """A request begins."""
        req_context.set_state(_Tenant(self._tenants.pop(req_context.req_id, "")))
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request ended; its jobs may still be under way."""
        self._lookups.cleanup(req_context.req_id)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """RETRY until the answer is there, which takes the lookup timeout at most."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Sends the step's lookups."""
        self._lookups.flush()

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begins to read blocks into host memory."""
        job = job_metadata
        self._begin()
        self._loading[job.job_id] = job.keys
        self._loaders.submit(self._load, job, self._blocks(job))

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Queues blocks to be written, the first ones of the prompt first; those that find the queue full are dropped.

        A job with dropped or unwritten blocks counts as failed.
        """
        job, blocks = job_metadata, self._blocks(job_metadata)
        self._begin()
        step = max(_WRITE_BYTES // self._block_size_bytes, 1)
        pieces = [blocks[i : i + step] for i in range(0, len(blocks), step)]
        writing = _Writing(job, len(pieces), self._finish)
        tenant = _tenant(job.req_context)
        for piece in pieces:
            if not self._store.store(piece, tenant, writing.done):
                writing.done([False])

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Jobs that ended since the last call."""
        results = []
        while not self._finished.empty():
            result = self._finished.get()
            keys = self._loading.pop(result.job_id, ())
            if not result.success:
                self._lookups.mark_miss(set(keys) - set(result.successful_keys or ()))
            results.append(result)
        return results

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What was seen in the store since the last call: vLLM publishes it as KV events of the medium STORAGE."""
        for _ in range(self._events.qsize()):
            yield self._events.get()

    def drain_jobs(self) -> None:
        """Waits until no job is under way, at most the timeouts of loads and writes."""
        with self._jobs_changed:
            self._jobs_changed.wait_for(lambda: self._jobs == 0)

    def shutdown(self) -> None:
        """Ends all threads; writes that wait are dropped."""
        self._lookups.shutdown()
        self._loaders.shutdown(cancel_futures=True)
        self._store.close()
        if self._reporter is not None:
            self._reporter.close()
        self._client.close()
        self._memory.release()

    def _tell(self, there: list[bytes], gone: list[bytes]) -> None:
        for hashes, removed in ((there, False), (gone, True)):
            if hashes:
                keys = [OffloadKey(block) for block in hashes]
                self._events.put(OffloadingEvent(keys, Medium.STORAGE, removed, self.locality))

    def _find(self, keys: Sequence[OffloadKey], context: ReqContext) -> list[bool]:
        found = self._store.lookup(keys, _tenant(context))
        tokens = self._span([key for key, there in zip(keys, found, strict=True) if there], context)
        if tokens and not self._store.worthwhile(tokens):
            return [False] * len(keys)
        context.set_state(_Offer(tokens))
        return found

    def _span(self, keys: Iterable[OffloadKey], context: ReqContext) -> int:
        """Tokens from the first block's begin to the last one's end."""
        ends = [(context.get_offload_key_position(key) or 0, key) for key in keys]
        if not ends:
            return 0
        first, key = min(ends)
        return max(ends)[0] - first + self._chunk_tokens[get_offload_group_idx(key)]

    def _blocks(self, job: TransferJob) -> list[Block]:
        size = self._block_size_bytes
        return [
            (bytes(key), self._memory[chunk * size : (chunk + 1) * size])
            for key, chunk in zip(job.keys, job.chunk_ids.tolist(), strict=True)
        ]

    def _load(self, job: TransferJob, blocks: list[Block]) -> None:
        good: list[OffloadKey] = []
        try:
            # What was found counts, not what is fetched: of a sliding window that is the end of it only.
            offer = job.req_context.get_state(_Offer)
            tokens = max(offer.tokens if offer is not None else 0, self._span(job.keys, job.req_context))
            sound = self._store.load(blocks, _tenant(job.req_context), tokens)
            good = [key for key, ok in zip(job.keys, sound, strict=True) if ok]
        except Exception:  # whatever it is, a request waits for the result
            logger.exception("KV store: a load failed")
        blocks.clear()
        complete = len(good) == len(job.keys)
        self._finish(JobResult(job.job_id, complete, None if complete else good))

    def _begin(self) -> None:
        with self._jobs_changed:
            self._jobs += 1

    def _finish(self, result: JobResult) -> None:
        self._finished.put(result)
        with self._jobs_changed:
            self._jobs -= 1
            self._jobs_changed.notify_all()

    def _report(self) -> dict[str, Any]:
        return {"counts": self._store.counts(), "servers": [asdict(node) for node in self._client.health()]}


def _tenant(context: ReqContext) -> str:
    tenant = context.get_state(_Tenant)
    assert tenant is not None, "on_new_request comes first"
    return tenant.name


def identity_of(spec: OffloadingSpec, weights: str, block_bytes: int) -> Identity:
    """What this engine's blocks are: engines of equal identity can use each other's."""
    config, parallel = spec.config, spec.config.parallel
    layout = {
        "layout": config.kv_cache_layout,
        "groups": [(group.tokens_per_block, group.layer_names) for group in config.groups],
        "parallel": (parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size),
        "hash_tokens": config.cache.tokens_per_hash,
    }
    return Identity(
        weights=weights,
        vllm_version=vllm.__version__,
        dtype=config.model.dtype,
        layout=repr(layout),
        isa=_isa(),
        block_tokens=spec.tokens_per_block[0] * spec.blocks_per_chunk,
        block_bytes=block_bytes,
    )


def _isa() -> str:
    if current_platform.is_cpu():
        amx = "-amx" if torch.cpu._is_amx_tile_supported() else ""
        return f"{current_platform.get_cpu_architecture().name}-{torch.backends.cpu.get_cpu_capability()}{amx}"
    return f"{current_platform.device_name}-{current_platform.get_device_capability()}"
