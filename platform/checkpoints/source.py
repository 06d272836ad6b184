"""From the config's model to a folder on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expertmesh.platform.config import DEMO, ModelConfig
from expertmesh.platform.weights.s3_location import S3_SCHEME, S3Location


def model_folder(
    model: ModelConfig, progress: Callable[[str, float], None] | None = None, *, whole: bool = False
) -> Path:
    """The checkpoint's folder, with `progress(what, fraction)` where that takes time.

    The demo's is built on first use (minutes). That of a model in S3 is a mirror: config.json, tokenizer and other
    small files are in it, and `open_checkpoint` gets tensors from S3; with `whole` the weights are in it, too, for
    engines that read the folder by themselves. Raises CheckpointError if the demo can't be built or S3 can't be read;
    what is in the folder is checked by `check_checkpoint`.
    """
    if model.source == DEMO:
        from expertmesh.platform.checkpoints.demo import demo_checkpoint

        return demo_checkpoint(model.resolved_cache_dir, progress)
    if not model.source.startswith(S3_SCHEME):
        return Path(model.source)
    from expertmesh.platform.weights.mirror import mirror
    from expertmesh.platform.weights.s3 import S3Settings
    from expertmesh.platform.weights.whole import download

    settings = S3Settings(**model.s3.model_dump())
    folder = mirror(S3Location.parse(model.source), settings, model.resolved_cache_dir, progress)
    if whole:
        download(folder, progress)
    return folder
