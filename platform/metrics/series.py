"""What a series is: its name, what it counts or measures, and the labels that tell its members apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

NAMESPACE = "ray"
"""What Ray's exporter puts in front of every name."""


class Kind(StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Label:
    """A label and all the values that it may have."""

    name: str
    values: tuple[str, ...] = ()
    """None given: the id of a replica or shard, which goes when that goes."""

    @property
    def is_member(self) -> bool:
        """Whether its values are members' ids."""
        return not self.values


@dataclass(frozen=True, slots=True)
class Series:
    """One metric. Only gauges may be told apart by member: Ray forgets the gauges of a process that is gone, but keeps
    its counters, which would pile up."""

    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending."""

    def __post_init__(self) -> None:
        """Raises ValueError for what would not be bounded, or is no histogram and has buckets."""
        if self.kind is not Kind.GAUGE and any(label.is_member for label in self.labels):
            raise ValueError(f"{self.name}: only a gauge has a label with members' ids")
        if (self.kind is Kind.HISTOGRAM) is not bool(self.buckets):
            raise ValueError(f"{self.name}: a histogram has buckets, and nothing else has")
        if list(self.buckets) != sorted(set(self.buckets)) or any(bound <= 0 for bound in self.buckets):
            raise ValueError(f"{self.name}: buckets ascend from more than 0")

    @property
    def exported(self) -> str:
        """Its name at Prometheus; a histogram's parts are this with `_bucket`, `_sum` and `_count`."""
        return f"{NAMESPACE}_{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"

    @property
    def names(self) -> tuple[str, ...]:
        """All names that an expression may ask for."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.exported}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exported,)

    def combinations(self) -> Iterator[dict[str, str]]:
        """Every set of label values; nothing for a gauge with members."""
        for values in product(*(label.values for label in self.labels)):
            yield dict(zip((label.name for label in self.labels), values, strict=True))
