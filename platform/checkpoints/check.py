"""Whether a folder is a checkpoint that a mesh can serve, before any engine is started on it."""

from __future__ import annotations

import re
from pathlib import Path

from expertmesh.errors import CheckpointError
from expertmesh.platform.checkpoints.checkpoint import Checkpoint, open_checkpoint
from expertmesh.platform.checkpoints.expert_layout import expert_layout, text_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")
"""One of these must be there; `*.tiktoken` will do too."""

# The language model's own, so that an encoder's layers in a multimodal checkpoint are not taken for it.
_STEM = r"(?:(?:model|language_model|text_model)\.)*"
_EMBEDDING = re.compile(_STEM + r"embed_tokens\.weight")
_LAYER = re.compile(_STEM + r"layers\.([0-9]{1,9})\..+")
_LAYER_NORM = re.compile(_STEM + r"layers\.[0-9]+\.(?:input|post_attention)_layernorm\.weight")


def check_checkpoint(folder: str | Path) -> Checkpoint:
    """Open `folder` and check it as far as that goes without reading tensor data.

    Raises CheckpointError for what `open_checkpoint` and `expert_layout` refuse, and if config.json has no
    architectures, if hidden_size, vocab_size or num_hidden_layers disagree with the embedding, the layer norms or
    the layers that the tensors' names show, or if there is no tokenizer.
    """
    checkpoint = open_checkpoint(folder)
    expert_layout(checkpoint)
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not all(isinstance(a, str) for a in architectures):
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: architectures must be a list of class names")
    _check_widths(checkpoint)
    _check_depth(checkpoint)
    _check_tokenizer(checkpoint.folder)
    return checkpoint


def _check_widths(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if not info.dtype.startswith(("F", "BF")):
            continue  # packed by a quantiser: the shape is not the layer's
        if _EMBEDDING.fullmatch(name):
            expected = [_size(checkpoint, "vocab_size"), _size(checkpoint, "hidden_size")]
            keys = "[vocab_size, hidden_size]"
        elif _LAYER_NORM.fullmatch(name):
            expected, keys = [_size(checkpoint, "hidden_size")], "[hidden_size]"
        else:
            continue
        if list(info.shape) != expected:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {list(info.shape)}, config.json says {keys} = {expected}"
            )


def _check_depth(checkpoint: Checkpoint) -> None:
    present = {int(match[1]) for match in map(_LAYER.fullmatch, checkpoint.tensors) if match}
    if not present:
        return
    depth = _size(checkpoint, "num_hidden_layers")
    # Compared as sets of what is there: `depth` may be any number that config.json likes to state.
    first_missing = next(layer for layer in range(len(present) + 1) if layer not in present)
    if first_missing < depth:
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor of layer {first_missing}, config.json says num_hidden_layers = {depth}"
        )


def _size(checkpoint: Checkpoint, key: str) -> int:
    value = text_config(checkpoint.config).get(key)
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {key} must be an integer > 0, not {value!r}")
    return value


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise CheckpointError(f"{folder}: has no tokenizer; needed is one of {', '.join(TOKENIZER_FILES)}, *.tiktoken")
