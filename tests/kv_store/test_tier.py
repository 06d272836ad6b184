"""The tier under vLLM's own offloading manager and over a real server, without an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from expertmesh.kv_store import StoreLimits, StoreSettings
from expertmesh.kv_store.tier import TierSettings, engine_arguments
from expertmesh.kv_store.tier.host_copy import HostCopyWorker
from expertmesh.kv_store.tier.manager import KVStoreTier
from expertmesh.kv_store.tier.spec import KVStoreSpec
from tests.kv_store.servers import PATIENCE_S, Server, until

BLOCK_BYTES = 1 << 20
TOKENS = 128
CHUNKS = 8
PATIENT = StoreLimits(lookup_timeout_s=PATIENCE_S, load_timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
STEP = ScheduleEndContext([], [])
KEYS = [make_offload_key(bytes([i]) * 32, 0) for i in range(CHUNKS)]


class Engine:
    """What of an engine is above the tier: the scheduler's calls, without a scheduler."""

    def __init__(self, manager: TieringOffloadingManager) -> None:
        self.manager = manager
        (tier,) = manager.secondary_tiers
        assert isinstance(tier, KVStoreTier)
        self.tier = tier
        self.memory = manager.primary_tier.get_kv_memoryview()

    def begin(self, request: str, tenant: str = "", keys: list[OffloadKey] = KEYS) -> ReqContext:
        """A request whose prompt is these blocks."""
        context = ReqContext(request)
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, (i + 1) * TOKENS)
        self.tier.admit(request, tenant)
        self.manager.on_new_request(context)
        return context

    def compute(self, context: ReqContext, keys: list[OffloadKey]) -> None:
        """Fills host memory with blocks, as if the model had computed them, and gives them to the store."""
        for key in keys:
            prepared = self.manager.prepare_store([key], context)
            assert prepared is not None
            assert isinstance(prepared.store_spec, CPULoadStoreSpec)
            (chunk,) = prepared.store_spec.block_ids
            np.asarray(self.memory)[chunk] = key[0]
            self.manager.complete_store([key], context)

    def settled(self, context: ReqContext, keys: list[OffloadKey]) -> list[LookupResult]:
        """Steps until no lookup is open any more."""
        results: list[LookupResult] = []

        def done() -> bool:
            results[:] = [self.manager.lookup(key, context) for key in keys]
            self.manager.on_schedule_end(STEP)
            return not {LookupResult.RETRY, LookupResult.HIT_PENDING} & set(results)

        until(done, "lookups are settled")
        return results

    def idle(self) -> None:
        """Steps until no transfer is under way."""

        def done() -> bool:
            self.manager.on_schedule_end(STEP)
            return not self.manager.has_pending_work()

        until(done, "transfers are done")

    def counts(self) -> dict[str, int]:
        return self.tier._store.counts()


NewEngine = Callable[..., Engine]


def offloading_config(settings_file: Path, engine: str) -> OffloadingConfig:
    arguments = engine_arguments(settings_file, CHUNKS * BLOCK_BYTES)["kv_transfer_config"]
    extra: dict[str, Any] = arguments["kv_connector_extra_config"]
    extra["secondary_tiers"][0]["model"] = "tiny"
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(TOKENS, ("layer",), 0),),
        worker_kv_bytes_per_block=BLOCK_BYTES,
        enable_kv_cache_events=False,
        extra_config=extra,
        engine_id=f"test-{engine}",
        model=OffloadingModelConfig("tiny", "float32"),
        cache=OffloadingCacheConfig(TOKENS, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )


@pytest.fixture
def new_engine(settings: StoreSettings, tmp_path: Path) -> Iterator[NewEngine]:
    with ExitStack() as stack:

        def made(name: str, limits: StoreLimits = PATIENT) -> Engine:
            file = tmp_path / name
            TierSettings(settings, limits, "a secret of all engines", "weights").save(file)
            manager = KVStoreSpec(offloading_config(file, name)).get_manager()
            assert isinstance(manager, TieringOffloadingManager)
            stack.callback(manager.shutdown)
            return Engine(manager)

        yield made


def test_what_one_engine_computed_is_in_anothers_memory(new_engine: NewEngine) -> None:
    first, second = new_engine("first"), new_engine("second")
    first.compute(first.begin("a"), KEYS[:3])
    first.idle()
    request = second.begin("b")
    assert second.settled(request, KEYS[:4]) == [LookupResult.HIT] * 3 + [LookupResult.MISS]
    spec = second.manager.prepare_load(KEYS[:3], request)
    assert isinstance(spec, CPULoadStoreSpec)
    assert [set(bytes(np.asarray(second.memory)[chunk])) for chunk in spec.block_ids] == [{0}, {1}, {2}]
    second.manager.complete_load(KEYS[:3], request)
    assert second.counts()["load_sound"] == 3


def test_a_tenants_blocks_are_its_own(new_engine: NewEngine) -> None:
    first, second = new_engine("first"), new_engine("second")
    first.compute(first.begin("a", "alice"), KEYS[:2])
    first.idle()
    assert second.settled(second.begin("b", "bob"), KEYS[:2]) == [LookupResult.MISS] * 2
    assert second.settled(second.begin("c"), KEYS[2:4]) == [LookupResult.MISS] * 2
    assert new_engine("third").settled(first.begin("d", "alice"), []) == []
    third = new_engine("fourth")
    assert third.settled(third.begin("e", "alice"), KEYS[:2]) == [LookupResult.HIT] * 2


def test_writes_that_would_wait_too_long_are_dropped_and_host_memory_is_free_again(
    new_engine: NewEngine, server: Server
) -> None:
    engine = new_engine("one", StoreLimits(max_queued_bytes=2 * BLOCK_BYTES, write_timeout_s=0.5))
    server.pause()
    request = engine.begin("a")
    engine.compute(request, KEYS)
    assert engine.counts()["dropped"] == CHUNKS - 2
    engine.idle()  # the two time out
    server.resume()
    others = [make_offload_key(bytes([100 + i]) * 32, 0) for i in range(CHUNKS)]
    engine.compute(engine.begin("b", keys=others), others)  # takes the place of the first ones
    engine.idle()


def test_a_fetch_that_takes_longer_than_computing_is_a_miss(new_engine: NewEngine) -> None:
    first, second = new_engine("first"), new_engine("second")
    first.compute(first.begin("a"), KEYS[:6])
    first.idle()
    assert second.settled(second.begin("b"), KEYS[:2]) == [LookupResult.HIT] * 2  # what a fetch takes is known now
    second.tier.computed(2 * TOKENS, 1e-9)
    second.tier.computed(4 * TOKENS, 1e-9)
    request = second.begin("c")
    assert second.settled(request, KEYS[2:4]) == [LookupResult.MISS] * 2
    assert second.counts()["gated"] == 1
    second.manager.on_request_finished(request)  # until then its verdict is everybody's
    second.tier.computed(4 * TOKENS, PATIENCE_S)
    assert second.settled(second.begin("d"), KEYS[2:6]) == [LookupResult.HIT] * 4


def test_a_block_that_went_away_after_it_was_found_is_a_miss_at_last(
    new_engine: NewEngine, server: Server, settings: StoreSettings
) -> None:
    from tests.kv_store.test_store import on

    first, second = new_engine("first"), new_engine("second")
    first.compute(first.begin("a"), KEYS[:2])
    first.idle()
    request = second.begin("b")
    for key in KEYS[:2]:
        assert second.manager.lookup(key, request) is LookupResult.RETRY
    second.manager.on_schedule_end(STEP)
    until(lambda: second.counts().get("found") == 2, "both are found")
    on(settings, "FLUSHALL")
    assert second.settled(request, KEYS[:2]) == [LookupResult.MISS] * 2
    assert second.counts()["load_missing"] == 2


def test_no_name_is_left_in_shared_memory(new_engine: NewEngine, tmp_path: Path, settings: StoreSettings) -> None:
    """The worker maps the region first, the scheduler then, as in an engine whose model runs in the core's process."""
    file = tmp_path / "settings"
    TierSettings(settings, PATIENT, "a secret of all engines", "weights").save(file)
    worker = KVStoreSpec(offloading_config(file, "named")).get_worker(caches(2, BLOCK_BYTES))
    assert Path("/dev/shm/vllm_offload_test-named.mmap").exists()
    manager = KVStoreSpec(offloading_config(file, "named")).get_manager()
    assert not Path("/dev/shm/vllm_offload_test-named.mmap").exists()
    manager.shutdown()
    worker.shutdown()


def caches(blocks: int, *pages: int, groups: list[list[int]] | None = None) -> CanonicalKVCaches:
    """Random KV caches of these page sizes in bytes; groups: the tensors of each, by default all of them."""
    tensors = [
        CanonicalKVCacheTensor(torch.randint(-128, 127, (blocks, page), dtype=torch.int8), page) for page in pages
    ]
    chosen = groups or [list(range(len(pages)))]
    return CanonicalKVCaches(tensors, [[CanonicalKVCacheRef(i, pages[i]) for i in group] for group in chosen])


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_blocks_go_to_host_memory_and_back(per_chunk: int) -> None:
    """Two groups that share a tensor; the first one's blocks begin in the middle of a chunk."""
    cache = caches(12, 96, 64, groups=[[0, 1], [0]])
    original = [tensor.tensor.clone() for tensor in cache.tensors]
    row = 4096
    region = SharedOffloadRegion("test-copies", 10, 0, row, (96 + 64) * per_chunk)
    worker = HostCopyWorker(cache, per_chunk, region)
    first = 2 if per_chunk == 3 else 0
    blocks = GPULoadStoreSpec([7, 8, 9, 10, 3, 4], group_sizes=[4, 2], block_indices=[first, 0])
    counts = (-(-(4 + first) // per_chunk), -(-2 // per_chunk))
    chunks = CPULoadStoreSpec([9, 1, 6, 2, 5, 0][: sum(counts)])
    assert worker.submit_store(1, blocks, chunks)
    for tensor in cache.tensors:
        tensor.tensor.zero_()
    assert worker.submit_load(2, chunks, blocks)
    done = worker.get_finished()
    assert [(result.job_id, result.success, result.transfer_size) for result in done] == [
        (1, True, 4 * 160 + 2 * 96),
        (2, True, 4 * 160 + 2 * 96),
    ]
    assert worker.get_finished() == []
    for block in range(12):
        whole, shared = block in (7, 8, 9, 10), block in (7, 8, 9, 10, 3, 4)
        assert torch.equal(
            cache.tensors[0].tensor[block], original[0][block] if shared else torch.zeros_like(original[0][0])
        )
        assert torch.equal(
            cache.tensors[1].tensor[block], original[1][block] if whole else torch.zeros_like(original[1][0])
        )
    worker.shutdown()
