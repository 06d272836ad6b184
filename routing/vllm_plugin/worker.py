"""vLLM's worker for CPU without a fault that lets one request end the engine.

A request with a seed draws its random numbers from a generator of its own. While its prompt is computed in chunks, vLLM
0.32 samples at the end of each, throws the token away and takes the draw back by moving the generator's offset, which
generators on CPU don't have: it raises, and the engine ends. Here such a request draws nothing before its prompt is
done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker


class MeshCPUWorker(CPUWorker):
    """Samples without the generators of requests whose token is thrown away."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        """As vLLM's."""
        batch = self.model_runner.input_batch
        thrown_away = np.flatnonzero(self.model_runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        kept = {index: batch.generators.pop(index) for index in thrown_away if index in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(kept)
