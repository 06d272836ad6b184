"""The dispatch as one opaque operator, so that Dynamo and CUDA graphs see a single node that they can split at."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from expertmesh.errors import ConfigError
from expertmesh.routing.dispatch import (
    Dispatcher,
    DispatchSettings,
    FailedRows,
    LoadCounters,
    Mailbox,
    SampledDispatcher,
    Sampler,
    TableFile,
)
from expertmesh.routing.vllm_plugin.settings import MeshSettings

OP_NAME = "expertmesh_dispatch"
failed_rows = FailedRows()
"""Of the step at hand in this process' engine."""
sampler: Sampler | None = None
"""Of dispatches, where this process' engine serves traced requests."""
_dispatcher: Dispatcher | None = None
_settings: MeshSettings | None = None


def open_dispatcher(settings: MeshSettings) -> None:
    """Gives this process its dispatcher. Later calls must carry the same settings; ConfigError otherwise."""
    global _dispatcher, _settings, sampler
    if _dispatcher is not None:
        if settings != _settings:
            raise ConfigError("two engines with different mesh settings in one process")
        return
    mailbox = Mailbox(Path(settings.mailbox))
    loads = LoadCounters(mailbox.loads_path, len(settings.layers), settings.num_experts)
    secret = Path(settings.secret_file).read_bytes().strip()
    tables, dispatch = TableFile(mailbox.table_path), DispatchSettings.of_json(settings.dispatch)
    if settings.dispatch_sample is None:
        _dispatcher = Dispatcher(tables, secret, dispatch, loads, failed_rows, mailbox.tell_trouble)
    else:
        sampler = Sampler(mailbox.samples_path, settings.dispatch_sample)
        _dispatcher = SampledDispatcher(
            tables, secret, dispatch, loads, failed_rows, mailbox.tell_trouble, sampler=sampler
        )
    _settings = settings


def _dispatch(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    assert _dispatcher is not None, "open_dispatcher runs when the first layer is built"
    return _dispatcher(layer, x, weights, ids)


def _dispatch_fake(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


@cache
def register_op() -> None:
    """Makes `torch.ops.vllm.expertmesh_dispatch(x, weights, ids, layer)` known, once a process."""
    direct_register_custom_op(OP_NAME, _dispatch, fake_impl=_dispatch_fake)
