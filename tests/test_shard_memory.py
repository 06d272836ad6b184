"""How much memory there is left, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.deployments.experts.memory import available_bytes

GIB = 1 << 30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal:       99999999 kB\nMemFree:         1 kB\nMemAvailable:   {8 * GIB >> 10} kB\n")
    return path


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 8 * GIB), (str(64 * GIB), 8 * GIB), (str(6 * GIB), 3 * GIB), (None, 8 * GIB)]
)
def test_the_lesser_of_host_and_container(meminfo: Path, tmp_path: Path, limit: str | None, expected: int) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{4 * GIB}\n")
        (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file 5\n")
    assert available_bytes(meminfo, tmp_path) == expected
