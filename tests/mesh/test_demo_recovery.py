"""A shard that is really killed."""

from __future__ import annotations

import pytest

from expertmesh import Client
from expertmesh.deployments.local import LocalMesh
from tests.mesh.test_demo_api import eventually
from tests.support.victims import replica_processes

pytestmark = pytest.mark.mesh


def test_a_killed_shard_is_replaced_and_requests_that_wait_go_on(demo_mesh: LocalMesh) -> None:
    settings = {"model": "demo", "prompt": "The three primary colours are", "max_tokens": 24, "temperature": 0}
    with Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client:
        before = client.completions.create(**settings).choices[0].text
        old = client.mesh.status()
        shards = replica_processes("experts")
        assert len(shards) == 2
        shards[0].kill()
        during = client.completions.create(**settings).choices[0].text  # redundancy is 1: it waits
        assert during == before
        assert eventually(lambda: client.mesh.status().health == "ok", 60)
        assert eventually(lambda: sum(shard.ready for shard in client.mesh.status().shards) == 2, 240)
        new = client.mesh.status()
        assert new.placement.epoch > old.placement.epoch
        assert {s.index for s in new.shards} == {0, 1}
        assert len({s.shard for s in new.shards} & {s.shard for s in old.shards}) == 1
        assert client.completions.create(**settings).choices[0].text == before


def test_experts_move_while_it_serves_and_answers_stay_the_same(demo_mesh: LocalMesh) -> None:
    settings = {"model": "demo", "prompt": "Water boils at", "max_tokens": 48, "temperature": 0}
    with Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client:
        assert client.mesh.freeze() is None
        assert client.mesh.placement().frozen
        client.mesh.freeze(False)
        before = client.completions.create(**settings).choices[0].text
        assert eventually(lambda: sum(map(sum, client.mesh.loads().tokens)) > 0, 10)
        # Experts that changed hands in the test before may still be on their way.
        assert eventually(lambda: client.mesh.plan().moves and not client.mesh.placement().running, 120)
        plan = client.mesh.apply()
        assert plan.moves, f"balancedness {plan.balancedness}"
        during = client.completions.create(**settings).choices[0].text
        assert during == before
        assert eventually(lambda: not client.mesh.placement().running, 60)
        placement = client.mesh.placement()
        assert len([move for move in placement.ended if "(done)" in move]) >= len(plan.moves)
        assert client.mesh.status().placement.missing_experts == 0
        assert client.completions.create(**settings).choices[0].text == before
