"""One helm for the run."""

from __future__ import annotations

import pytest

from tests.helm.binaries import helm_binary
from tests.helm.chart import Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(helm_binary(), tmp_path_factory.mktemp("helm"))
