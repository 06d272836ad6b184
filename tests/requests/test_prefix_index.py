"""The prefix index against a plain model: one set and one counter a replica."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from expertmesh.routing.requests import Cleared, PrefixIndex, Removed, Stored

REPLICAS = ("a", "b", "c")
BLOCKS = range(6)
replicas = st.sampled_from(REPLICAS)
blocks = st.lists(st.sampled_from(BLOCKS), max_size=6, unique=True).map(tuple)


class IndexAgainstSets(RuleBasedStateMachine):
    """Any order of calls leaves the index as the sets."""

    @initialize()
    def empty(self) -> None:
        self.index = PrefixIndex()
        self.held: dict[str, set[int]] = {}
        self.expected: dict[str, Counter[int]] = {}
        self.under_way: list[tuple[str, tuple[int, ...]]] = []
        self.lost: set[str] = set()
        for replica in REPLICAS:
            self.join(replica)

    def join(self, replica: str) -> None:
        self.index.add(replica)
        self.held[replica] = set()
        self.expected[replica] = Counter()

    @rule(replica=replicas, stored=blocks)
    def stored(self, replica: str, stored: tuple[int, ...]) -> None:
        self.index.apply(replica, Stored(stored))
        self.held[replica] |= set(stored)
        self.lost.discard(replica)

    @rule(replica=replicas, gone=blocks)
    def removed(self, replica: str, gone: tuple[int, ...]) -> None:
        self.index.apply(replica, Removed(gone))
        self.held[replica] -= set(gone)
        self.lost.discard(replica)

    @rule(replica=replicas)
    def cleared(self, replica: str) -> None:
        self.index.apply(replica, Cleared())
        self.held[replica].clear()
        self.lost.discard(replica)

    @rule(replica=replicas)
    def lose(self, replica: str) -> None:
        self.index.lose(replica)
        self.held[replica].clear()
        self.lost.add(replica)

    @rule(replica=replicas, prompt=blocks)
    def expect(self, replica: str, prompt: tuple[int, ...]) -> None:
        self.index.expect(replica, prompt)
        self.expected[replica].update(prompt)
        self.under_way.append((replica, prompt))

    @rule(data=st.data())
    def unexpect(self, data: st.DataObject) -> None:
        if self.under_way:
            replica, prompt = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
            self.index.unexpect(replica, prompt)
            self.expected[replica].subtract(prompt)

    @rule(replica=replicas)
    def replaced(self, replica: str) -> None:
        self.index.remove(replica)
        self.under_way = [entry for entry in self.under_way if entry[0] != replica]
        self.lost.discard(replica)
        self.join(replica)

    @rule(prompt=blocks)
    def matches(self, prompt: tuple[int, ...]) -> None:
        for replica, length in self.index.match(prompt).items():
            there = set() if replica in self.lost else self.there(replica)
            assert length == next((i for i, block in enumerate(prompt) if block not in there), len(prompt))

    def there(self, replica: str) -> set[int]:
        return self.held[replica] | {block for block, n in self.expected[replica].items() if n}

    @invariant()
    def sizes(self) -> None:
        for replica in REPLICAS:
            assert self.index.size(replica) == len(self.there(replica))


TestIndexAgainstSets = IndexAgainstSets.TestCase
TestIndexAgainstSets.settings = settings(deadline=None)


def test_a_replica_is_added_once() -> None:
    index = PrefixIndex()
    index.add("a")
    with pytest.raises(ValueError, match="'a' is in the index already"):
        index.add("a")


@settings(deadline=None)
@given(names=st.lists(st.text(max_size=4), min_size=1, max_size=80, unique=True))
def test_any_number_of_replicas(names: list[str]) -> None:
    index = PrefixIndex()
    for position, name in enumerate(names):
        index.add(name)
        index.apply(name, Stored(tuple(range(position))))
    assert index.match(range(len(names))) == {name: position for position, name in enumerate(names)}
    index.remove(names[0])
    index.add("another name")
    assert index.match(range(len(names)))["another name"] == 0
