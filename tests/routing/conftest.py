"""Meshes of real shards, with a check at the end that nothing of them is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.routing.harness import Mesh, data_plane_threads


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_mesh() -> Iterator[Callable[..., Mesh]]:
    """Starts meshes; ends them after the test and checks that no thread is left."""
    meshes: list[Mesh] = []

    def make(shards: int, redundancy: int = 1, **options: Any) -> Mesh:
        meshes.append(Mesh(shards, redundancy, **options))
        return meshes[-1]

    yield make
    for mesh in meshes:
        mesh.close()
    assert not data_plane_threads()
