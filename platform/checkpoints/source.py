"""From the config's model to a folder on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expertmesh.platform.config import DEMO, ModelConfig


def model_folder(model: ModelConfig, progress: Callable[[str, float], None] | None = None) -> Path:
    """The checkpoint's folder; the demo's is built on first use (minutes), with `progress(what, fraction)`.

    Raises CheckpointError if the demo can't be built; what is in the folder is checked by `check_checkpoint`.
    """
    if model.source != DEMO:
        return Path(model.source)
    from expertmesh.platform.checkpoints.demo import demo_checkpoint

    return demo_checkpoint(model.resolved_cache_dir, progress)
