"""Copies between a KV cache in the CPU's memory and the region of host memory that the store reads and writes.

vLLM's own worker for this needs a GPU's streams.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

Rows = NDArray[np.int8]


class HostCopyWorker(OffloadingWorker):
    """Copies at once, in the caller's thread: a block is some MB, a step of the model takes longer than that.

    A row of the region holds `blocks_per_chunk` blocks of each of the cache's tensors, one tensor after the other. Owns
    the region: `shutdown` gives it back.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._cache: list[Rows] = []
        """Of each tensor: [blocks, page bytes]."""
        self._host: list[Rows] = []
        """Of each tensor: [chunks, page bytes * blocks_per_chunk]."""
        for tensor in kv_caches.tensors:
            page = tensor.page_size_bytes
            self._cache.append(tensor.tensor.view(torch.int8).numpy())
            self._host.append(region.create_next_worker_view(page * blocks_per_chunk).numpy())
        self._refs = kv_caches.group_data_refs
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """From the cache to the region."""
        return self._copy(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """From the region to the cache."""
        return self._copy(job_id, dst_spec, src_spec, store=False)

    def get_finished(self) -> list[TransferResult]:
        """What was copied since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Gives the region back."""
        self._cache.clear()
        self._host.clear()
        self._region.cleanup()

    def _copy(self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, store: bool) -> bool:
        assert isinstance(chunks, BlockIDsLoadStoreSpec)
        begin = time.perf_counter()
        nbytes = block = chunk = 0
        for refs, count, first in zip(self._refs, blocks.group_sizes, blocks.block_indices, strict=True):
            skipped = first % self._blocks_per_chunk  # the group's first block may lie within a chunk
            for i in range(count):
                row, place = divmod(skipped + i, self._blocks_per_chunk)
                block_id, chunk_id = blocks.block_ids[block + i], chunks.block_ids[chunk + row]
                for ref in refs:
                    cache = self._cache[ref.tensor_idx][block_id]
                    host = self._host[ref.tensor_idx][chunk_id]
                    size, begins = ref.page_size_bytes, place * len(cache)
                    if store:
                        host[begins : begins + size] = cache[:size]
                    else:
                        cache[:size] = host[begins : begins + size]
                    nbytes += size
            block += count
            chunk += -(-(count + skipped) // self._blocks_per_chunk) if count else 0
        self._done.append(TransferResult(job_id, True, nbytes, time.perf_counter() - begin))
        return True
