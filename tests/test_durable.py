"""Terms of controllers: nobody shares one, what was decided is inherited, and who is deposed notices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from expertmesh.deployments.controller.durable import EPOCHS_A_TERM, Deposed, Office, PlacementState, first_epoch
from tests.support.key_values import Memory


def state(expert: int, frozen: bool = False) -> PlacementState:
    return PlacementState("model-2x1", np.full((2, 3, 4), expert, dtype=np.int32), frozen)


def test_the_next_one_inherits_what_was_decided_last() -> None:
    store = Memory()
    first = Office(store, "app")
    assert (first.term, first.inherited) == (1, None)
    first.save(state(3))
    first.save(state(5, frozen=True))
    second = Office(store, "app")
    assert second.term == 2
    assert second.inherited is not None
    assert second.inherited.frozen
    assert second.inherited.of == "model-2x1"
    assert np.array_equal(second.inherited.slots, state(5).slots)
    for _ in range(3):  # those between never decided anything
        later = Office(store, "app")
        assert later.inherited is not None
        assert np.array_equal(later.inherited.slots, state(5).slots)
    assert Office(store, "another app").inherited is None


def test_one_that_was_deposed_notices_and_nobody_reads_what_it_wrote() -> None:
    store = Memory()
    old = Office(store, "app")
    old.save(state(1))
    new = Office(store, "app")
    new.save(state(2))
    with pytest.raises(Deposed, match="term 2 has taken over from this one, of term 1"):
        old.save(state(9))
    with pytest.raises(Deposed):
        old.check()
    new.check()
    inherited = Office(store, "app").inherited
    assert inherited is not None
    assert np.array_equal(inherited.slots, state(2).slots)


def test_a_later_term_has_only_higher_epochs() -> None:
    assert first_epoch(2) > first_epoch(1) + EPOCHS_A_TERM - 1


def test_many_that_start_at_once_all_get_another_term() -> None:
    store = Memory()
    with ThreadPoolExecutor(8) as pool:
        terms = list(pool.map(lambda _: Office(store, "app").term, range(40)))
    assert sorted(terms) == sorted(set(terms))


def test_old_terms_are_cleared_away() -> None:
    store = Memory()
    for _ in range(10):
        Office(store, "app").save(state(1))
    assert len(store.keys("controller/app/")) <= 4


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"shape": [1, 2], "slots": [1], "frozen": false}'])
def test_what_is_no_placement_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"placement|Expecting|reshape"):
        PlacementState.from_bytes(data)
