"""Shards that come and go at a word, while requests run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from expertmesh import Client
from expertmesh.deployments.local import LocalMesh
from tests.mesh.test_demo_api import eventually

pytestmark = pytest.mark.mesh


def test_a_shard_comes_and_one_goes_and_no_request_notices(demo_mesh: LocalMesh) -> None:
    settings = {"model": "demo", "prompt": "The moon is", "max_tokens": 16, "temperature": 0}
    with Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client, ThreadPoolExecutor(1) as pool:
        before = client.completions.create(**settings).choices[0].text
        old = {shard.shard: shard.bytes_read for shard in client.mesh.status().shards}
        whole = client.mesh.status().placement
        over = False

        def ask_all_the_time() -> set[str]:
            said = set()
            while not over:
                said.add(client.completions.create(**settings).choices[0].text)
            return said

        def settled(shards: int) -> bool:
            status = client.mesh.status()
            held = [shard.experts for shard in status.shards if shard.ready and not shard.leaving]
            placed = status.placement
            assert placed.missing_experts == 0
            return len(status.shards) == len(held) == shards and sum(held) == placed.layers * placed.experts

        answers = pool.submit(ask_all_the_time)
        try:
            assert client.mesh.scale(experts=3).experts == 3
            assert eventually(lambda: settled(3), 300)
            shards = client.mesh.status().shards
            assert {shard.experts for shard in shards} == {whole.layers * whole.experts // 3}
            (new,) = [shard for shard in shards if shard.shard not in old]
            assert new.bytes_read == whole.expert_bytes // 3, "it has read its share and nothing else"
            assert {shard.shard: shard.bytes_read for shard in shards if shard.shard in old} == old
            assert client.mesh.scale(experts="auto").experts == 2
            assert eventually(lambda: settled(2), 300)
        finally:
            over = True
        assert answers.result(300) == {before}
