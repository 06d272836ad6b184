"""A controller that isn't in office any more: it outbids nobody, and leaves alone what is another's."""

from __future__ import annotations

import asyncio
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.platform.autoscaling.targets import Targets
from expertmesh.platform.config import load_config
from tests.support.key_values import Memory
from tests.test_client import NODE, attention_report, write_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from expertmesh.deployments.controller.controller import Controller
    from expertmesh.deployments.controller.durable import Deposed, first_epoch
    from expertmesh.deployments.messages import JoinRequest


def controller(folder: Path, store: Memory) -> Controller:
    return Controller(load_config({"model": write_checkpoint(folder), "experts": {"shards": 2}}), store)


def test_epochs_of_a_later_term_are_not_outbid(tmp_path: Path) -> None:
    later = first_epoch(2) + 3

    async def deposed_by_a_report() -> None:
        old = controller(tmp_path, Memory())
        old.check_health()
        with pytest.raises(Deposed, match="later term than 1"):
            await old.report(replace(attention_report(), epoch=later))
        with pytest.raises(Deposed):
            old.check_health()
        with pytest.raises(Deposed):
            await old.watch(0, 0.0)
        with pytest.raises(Deposed):
            await old.join(JoinRequest("shard", NODE))

    async def deposed_by_a_shard() -> None:
        old = controller(tmp_path, Memory())
        with pytest.raises(Deposed):
            await old.join(JoinRequest("shard", NODE, seen_epoch=later))

    asyncio.run(deposed_by_a_report())
    asyncio.run(deposed_by_a_shard())


def test_its_own_epochs_are_no_reason_to_step_down(tmp_path: Path) -> None:
    async def run() -> None:
        mine = controller(tmp_path, Memory())
        await mine.report(replace(attention_report(), epoch=first_epoch(2) - 1))
        assert await mine.join(JoinRequest("shard", NODE, seen_epoch=first_epoch(1) + 9)) is not None
        mine.check_health()

    asyncio.run(run())


def test_numbers_set_by_hand_outlive_a_controller_that_another_took_over_from(tmp_path: Path) -> None:
    async def run() -> None:
        store = Memory()
        old = controller(tmp_path, store)
        await old.scale(attention=3)
        new = controller(tmp_path, store)
        old.__del__()
        assert Targets(store, "").manual("attention") == 3
        new.__del__()
        assert Targets(store, "").manual("attention") is None, "the application was removed"

    asyncio.run(run())
