"""vLLM's tiered offloading on the CPU platform too, and without a file that a killed engine leaves behind."""

from __future__ import annotations

from pathlib import Path

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from expertmesh.errors import ConfigError
from expertmesh.kv_store.tier.host_copy import HostCopyWorker

_LEAST_CHUNKS = 4

_named: dict[str, SharedOffloadRegion] = {}
"""Regions of this process's workers, by path, until the scheduler has mapped the same file."""


class KVStoreSpec(TieringOffloadingSpec):
    """TieringOffloadingSpec, with a worker for the CPU platform.

    There the model and the scheduler are in one process; as soon as both have mapped the region, its name is removed
    from /dev/shm, so that the memory goes with the process however that ends.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        """Raises ConfigError for host memory that holds next to nothing."""
        super().__init__(config)
        if self.num_chunks < _LEAST_CHUNKS:
            raise ConfigError(
                f"kv_store.host_memory_mib: a block of this model takes {self.kv_bytes_per_chunk / 2**20:.1f} MiB; "
                f"at least {_LEAST_CHUNKS} must fit"
            )
        self._host_worker: HostCopyWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """What copies between the KV cache and host memory."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._host_worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            _named[region.mmap_path] = region
            self._host_worker = HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._host_worker

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side."""
        manager = super().get_manager()
        assert self._scheduler_mmap is not None
        worker_region = _named.pop(self._scheduler_mmap.mmap_path, None)
        if worker_region is not None:
            Path(worker_region.mmap_path).unlink()
            worker_region._creator = False  # else its cleanup would look for the file
        return manager
