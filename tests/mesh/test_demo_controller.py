"""A controller that is killed, and one that is deposed and doesn't know it."""

from __future__ import annotations

import psutil
import pytest

from expertmesh import Client
from expertmesh.deployments.controller.durable import Deposed, Office, PlacementState, RayKeyValues, first_epoch
from expertmesh.deployments.local import LocalMesh
from tests.mesh.test_demo_api import eventually
from tests.support.victims import replica_processes

pytestmark = pytest.mark.mesh


def held(client: Client) -> list[list[list[int]]]:
    """The experts in each shard's slots, by layer, wherever in it they are."""
    slots = client.mesh.placement().slots
    return [[sorted(expert for expert in layer if expert >= 0) for layer in shard] for shard in slots]


def test_a_killed_controller_comes_back_with_a_higher_epoch_and_what_it_had_decided(demo_mesh: LocalMesh) -> None:
    settings = {"model": "demo", "prompt": "The sun is", "max_tokens": 24, "temperature": 0}
    with Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client:
        before = client.completions.create(**settings).choices[0].text
        client.mesh.freeze()
        epoch = client.mesh.status().placement.epoch
        before_kill = held(client)
        (controller,) = replica_processes("controller")
        controller.kill()
        assert client.completions.create(**settings).choices[0].text == before, "serving doesn't need it"

        def is_back() -> bool:
            try:
                return client.mesh.status().placement.epoch > epoch and client.mesh.status().health == "ok"
            except Exception:
                return False

        assert eventually(is_back, 120)
        assert client.mesh.placement().frozen
        # On a busy machine a shard may have been late enough to be stood in for.
        assert eventually(lambda: held(client) == before_kill, 120)
        client.mesh.freeze(False)
        assert client.completions.create(**settings).choices[0].text == before


def test_a_controller_whose_hand_is_held_while_another_takes_office_ends(demo_mesh: LocalMesh) -> None:
    """The test itself takes office in the store of the running cluster."""
    with Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client:
        (old,) = replica_processes("controller")
        epoch = client.mesh.status().placement.epoch
        old.suspend()
        usurper = Office(RayKeyValues(), "expertmesh")
        assert first_epoch(usurper.term) > epoch
        old.resume()
        assert eventually(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, 120), "it is deposed"

        def is_back() -> bool:
            try:
                return client.mesh.status().placement.epoch > first_epoch(usurper.term)
            except Exception:
                return False

        assert eventually(is_back, 120)
        inherited = usurper.inherited
        assert inherited is not None
        with pytest.raises(Deposed):
            usurper.save(PlacementState(inherited.of, inherited.slots, frozen=True))
        assert not client.mesh.placement().frozen, "what it wrote is nobody's business"
