"""One front for all tests of the API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fastapi import FastAPI


@pytest.fixture(scope="session")
def front(family: Callable[[str], Path]) -> Iterator[tuple[str, FastAPI]]:
    """Its URL, and the application."""
    from tests.api.front import MODEL, served_front

    with served_front(family(MODEL)) as front:
        yield front
