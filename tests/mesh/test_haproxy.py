"""HAProxy in the place of Serve's proxy, on a Ray of the mesh's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.timing import free_port
from expertmesh import Client
from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.config import load_config

pytestmark = [pytest.mark.mesh, pytest.mark.long]


def haproxies() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if "haproxy" in p.name()}


def test_it_hands_requests_to_the_ingress_and_is_gone_with_the_mesh(family: Callable[[str], Path]) -> None:
    settings = {
        "model": str(family("qwen3_moe")),
        "experts": {"mode": "colocated"},
        "ingress": {"port": free_port(), "proxy": "haproxy"},
        "attention": {"kv_cache_gib": 0.25},
    }
    with LocalMesh(load_config(settings)) as mesh:
        assert haproxies()
        with Client(base_url=mesh.url, timeout=120) as client:
            body = {"model": "qwen3_moe", "prompt": [40, 77, 301], "max_tokens": 8, "temperature": 0}
            whole = client.completions.create(**body)
            stream = client.completions.create(**body, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
            assert client.mesh.status().ok
        assert httpx.get(f"{mesh.url}/v1/nothing").status_code == 404
        old = haproxies()
    assert not old & set(psutil.pids())
