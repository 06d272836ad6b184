"""One browser a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.console.chromium import browser, why_not


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with browser() as running:
        yield running
