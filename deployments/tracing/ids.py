"""Ids of spans that are told to their children before they begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

_promised: ContextVar[int | None] = ContextVar("promised span id", default=None)


class GivenIds(RandomIdGenerator):
    """Gives a span the id that was promised to its children, else a random one."""

    def generate_span_id(self) -> int:
        """As the SDK says."""
        given = _promised.get()
        return super().generate_span_id() if given is None else given


def promised_id() -> int:
    """An id for a span that begins later."""
    return RandomIdGenerator().generate_span_id()


@contextmanager
def promised(span_id: int) -> Iterator[None]:
    """The span that begins in the block has this id."""
    token = _promised.set(span_id)
    try:
        yield
    finally:
        _promised.reset(token)
