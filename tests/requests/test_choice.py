"""The ranking of replicas: what each thing that happens does to the next choice."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError
from expertmesh.routing.requests import (
    Cleared,
    CostModel,
    Event,
    EventBatch,
    Lapsed,
    Offloaded,
    Removed,
    ReplicaChoice,
    StoreContent,
    Stored,
)


def choice_of(*replicas: str, costs: CostModel | None = None) -> ReplicaChoice:
    choice = ReplicaChoice(costs or CostModel())
    for replica in replicas:
        choice.add(replica)
    return choice


def tell(choice: ReplicaChoice, replica: str, sequence: int, *events: Event) -> None:
    choice.apply(replica, EventBatch(sequence, events))


def best(choice: ReplicaChoice, prompt: tuple[int, ...]) -> str:
    return choice.rank(prompt)[0].replica


PROMPT = tuple(range(40))


def test_the_worked_numbers_of_the_docstring() -> None:
    costs = CostModel()
    assert costs.score(4, 50, costs.work(40, 30, 0)) == 18.5
    assert costs.score(20, 240, costs.work(40, 30, 0)) == 52
    assert costs.score(0, 0, costs.work(40, 0, 0)) == 40


def test_a_request_goes_where_its_prefix_is_until_that_replica_is_busy() -> None:
    choice = choice_of("a", "b")
    tell(choice, "b", 0, Stored(PROMPT[:30]))
    assert [(r.replica, r.score, r.held) for r in choice.rank(PROMPT)] == [("b", 10.0, 30), ("a", 40.0, 0)]
    for i in range(20):
        choice.routed(f"other {i}", "b", tuple(range(1000 * (i + 1), 1000 * (i + 1) + 12)))
    assert [(r.replica, round(r.score, 9)) for r in choice.rank(PROMPT)] == [("a", 40.0), ("b", 52.0)]


def test_first_token_ends_the_prefill_and_finished_the_load() -> None:
    choice = choice_of("a", costs=CostModel(backlog_weight=1, request_blocks=3, queued_block=1))
    other = (99,)
    scores = [choice.rank(other)[0].score]
    choice.routed("x", "a", PROMPT)
    scores.append(choice.rank(other)[0].score)
    choice.first_token("x")
    scores.append(choice.rank(other)[0].score)
    choice.first_token("x")
    choice.finished("x")
    choice.finished("x")
    scores.append(choice.rank(other)[0].score)
    assert scores == [1, 44, 4, 1]


def test_a_request_under_way_counts_as_held_and_events_take_over() -> None:
    choice = choice_of("a", "b")
    choice.routed("x", "b", PROMPT)
    assert best(choice, (*PROMPT, 41)) == "b", "the second of two equal prompts follows the first one"
    tell(choice, "b", 0, Stored(PROMPT))
    choice.finished("x")
    assert choice.rank(PROMPT)[0].held == len(PROMPT)


@pytest.mark.parametrize("event", [Removed(PROMPT), Cleared()])
def test_an_eviction_is_a_miss(event: Event) -> None:
    choice = choice_of("a", "b")
    tell(choice, "b", 0, Stored(PROMPT))
    assert best(choice, PROMPT) == "b"
    tell(choice, "b", 1, event)
    assert {r.held for r in choice.rank(PROMPT)} == {0}


def test_the_store_costs_more_than_a_hit_and_less_than_computing() -> None:
    choice = choice_of("a", "b", costs=CostModel(store_block=0.25))
    tell(choice, "b", 0, Stored(PROMPT[:20]), Offloaded(PROMPT[:30]))
    scores = {r.replica: r.score for r in choice.rank(PROMPT)}
    assert scores == {"a": 30 * 0.25 + 10, "b": 10 * 0.25 + 10}
    tell(choice, "a", 0, Lapsed(PROMPT[10:12]))
    assert {r.replica: r.score for r in choice.rank(PROMPT)} == {"a": 10 * 0.25 + 30, "b": 20}


def test_what_the_store_holds_outlives_the_replica_that_told_it() -> None:
    choice = choice_of("a", "b", costs=CostModel(store_block=0.25))
    tell(choice, "b", 0, Offloaded(PROMPT))
    choice.lose("b")
    choice.remove("b")
    assert [r.score for r in choice.rank(PROMPT)] == [len(PROMPT) * 0.25]


def test_the_newest_blocks_of_the_store_are_remembered() -> None:
    content = StoreContent(max_blocks=3)
    assert content.add((1, 2, 3)) == [1, 2, 3]
    assert content.add((1, 4)) == [4]
    assert set(content) == {1, 3, 4}
    assert content.discard((2, 3)) == [3]
    assert content.leading((1, 4, 3)) == 2


def test_a_store_makes_a_busy_holder_lose_earlier() -> None:
    choice = choice_of("a", "b")
    tell(choice, "b", 0, Stored(PROMPT))
    for i in range(15):
        choice.routed(f"other {i}", "b", (1000 + i,))
    assert best(choice, PROMPT) == "b"
    tell(choice, "b", 1, Offloaded(PROMPT))
    assert best(choice, PROMPT) == "a"


def test_a_hot_prefix_spreads() -> None:
    choice = choice_of("a", "b", "c", "d")
    suffixes = count(1000)
    took = [0] * 4
    for i in range(400):
        prompt = (*PROMPT, next(suffixes))
        replica = best(choice, prompt)
        choice.routed(str(i), replica, prompt)
        took["abcd".index(replica)] += 1
    assert min(took) > 50


def test_one_that_is_enough_keeps_its_prefix_to_itself() -> None:
    choice = choice_of("a", "b", "c", "d")
    tell(choice, "c", 0, Stored(PROMPT))
    for i in range(400):
        prompt = (*PROMPT, 1000 + i)
        assert best(choice, prompt) == "c"
        choice.routed(str(i), "c", prompt)
        choice.finished(str(i))


def test_a_new_replica_gets_the_next_request_that_nobody_has_a_prefix_of() -> None:
    choice = choice_of("a", "b")
    for i in range(10):
        replica = best(choice, (i,))
        choice.routed(str(i), replica, (i,))
    choice.add("new")
    assert best(choice, (100,)) == "new"


def test_requests_of_other_routers_count_where_the_replica_reports_them() -> None:
    choice = choice_of("a", "b")
    choice.observe("a", 5)
    assert best(choice, (1,)) == "b"
    choice.routed("x", "b", (2,))
    choice.observe("b", 1)
    assert choice.rank((1,))[0].score == CostModel().score(1, 1, 1), "our own request is among the reported ones"


def test_a_lost_stream_degrades_to_load_only_and_recovers() -> None:
    choice = choice_of("a", "b")
    tell(choice, "b", 7, Stored(PROMPT))
    choice.routed("x", "b", (*PROMPT, 50))
    choice.lose("b")
    assert [r.held for r in choice.rank(PROMPT)] == [0, 0]
    assert best(choice, PROMPT) == "a", "only the load is left to tell them apart"
    tell(choice, "b", 3, Stored(PROMPT[:10]))
    choice.finished("x")
    assert {r.replica: r.held for r in choice.rank(PROMPT)} == {"a": 0, "b": 10}


def test_a_gap_in_the_sequence_is_a_loss_and_a_repeated_batch_is_nothing() -> None:
    choice = choice_of("a")
    tell(choice, "a", 5, Stored(PROMPT[:10]))
    tell(choice, "a", 6, Stored(PROMPT[10:20]))
    tell(choice, "a", 6, Cleared())
    tell(choice, "a", 5, Cleared())
    assert choice.rank(PROMPT)[0].held == 20
    tell(choice, "a", 8, Stored(PROMPT[:5]))
    assert choice.rank(PROMPT)[0].held == 5, "what batch 7 removed is not known, so nothing older is trusted"


def test_a_replica_that_goes_takes_its_requests_along() -> None:
    choice = choice_of("a", "b")
    choice.routed("x", "a", PROMPT)
    choice.remove("a")
    choice.first_token("x")
    choice.finished("x")
    choice.add("a")
    assert choice.rank(PROMPT)[0].score == len(PROMPT)
    choice.routed("x", "b", PROMPT)
    with pytest.raises(ValueError, match="'x' is routed already"):
        choice.routed("x", "b", PROMPT)


def test_no_replica_is_an_empty_ranking() -> None:
    assert ReplicaChoice().rank(PROMPT) == ()


@settings(deadline=None)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)), max_size=30
    )
)
def test_the_same_calls_give_the_same_ranking_and_nothing_is_left_in_the_end(
    operations: list[tuple[str, list[int]]],
) -> None:
    costs = CostModel(store_block=0.3)
    one, two = choice_of(*"abc", costs=costs), choice_of(*"abc", costs=costs)
    for choice in (one, two):
        for number, (replica, blocks) in enumerate(operations):
            choice.rank(blocks)
            choice.routed(str(number), replica, blocks)
    assert one.rank(range(5)) == two.rank(range(5))
    for number in range(len(operations)):
        one.finished(str(number))
    assert {r.replica: r for r in one.rank(range(5))} == {r.replica: r for r in choice_of(*"abc").rank(range(5))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backlog_weight": -0.1}, "backlog_weight: -0.1 must not be negative"),
        ({"request_blocks": float("nan")}, "request_blocks: nan"),
        ({"queued_block": -1}, "queued_block: -1"),
        ({"store_block": 1.5}, "store_block: 1.5 is not from 0 to 1"),
    ],
)
def test_a_weight_that_means_nothing_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel(**changes)


def test_a_request_is_a_part_of_a_prompt_whatever_its_length() -> None:
    """The same prompts in blocks of a quarter: four times the blocks, and the same ranking all along."""
    coarse, fine = ReplicaChoice(), ReplicaChoice()
    for choice in (coarse, fine):
        choice.add("a")
        choice.add("b")
    for i in range(40):
        prompt = [*range(6), *range(100 * i + 100, 100 * i + 100 + i % 7)]
        quarters = [4 * block + part for block in prompt for part in range(4)]
        ranked, finer = coarse.rank(prompt), fine.rank(quarters)
        assert [rank.replica for rank in ranked] == [rank.replica for rank in finer]
        if i:
            assert [4 * rank.score for rank in ranked] == pytest.approx([rank.score for rank in finer])
        coarse.routed(str(i), ranked[0].replica, prompt)
        fine.routed(str(i), finer[0].replica, quarters)
    assert CostModel.for_prompts_of(24) == CostModel()


def test_a_stored_last_block_ends_the_prefill() -> None:
    choice = choice_of("a", "b", costs=CostModel(backlog_weight=1, request_blocks=3, queued_block=1))
    for name in ("x", "y"):
        choice.routed(name, "a", PROMPT)
    choice.routed("z", "a", (*PROMPT, 41))
    tell(choice, "a", 0, Stored(PROMPT[:-1]))
    assert choice.rank((99,))[1].score == 9 + len(PROMPT) + 1 + 1, "the last blocks are still to come"
    tell(choice, "a", 1, Stored(PROMPT[-1:]))
    assert choice.rank((99,))[1].score == 9 + 1 + 1, "x is computed, and y with it; z is not"
    choice.first_token("x")
    for name in ("x", "y", "z"):
        choice.finished(name)
    assert choice.rank((99,))[1].score == 1


def test_without_anything_to_tell_them_apart_replicas_take_turns() -> None:
    choice = choice_of("a", "b", "c")
    took = []
    for i in range(4):
        took.append(best(choice, ()))
        choice.routed(str(i), took[-1], ())
        choice.finished(str(i))
    choice.add("new")
    assert "".join(took) == "abca"
    assert [rank.replica for rank in choice.rank(())] == ["new", "b", "c", "a"]
