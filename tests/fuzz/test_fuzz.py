"""The fuzzer in short: it finds nothing in the code, and bugs that are planted. `python -m tests.fuzz.run` is long."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.build import build, sanitizer_library
from tests.fuzz.campaign import Campaign, mutated
from tests.fuzz.run import TEXTS, fuzz
from tests.fuzz.worker import targets

compiled = pytest.mark.skipif(sanitizer_library() is None, reason="needs gcc with its sanitizers")

FRAMES = ("header", "server", "client")
PLANTED = {
    "header": ("frame.c", "|| data[7] != 0", "", "taken by the extension only"),  # padding that is not zero
    "server": ("server.c", "largest < header", "largest <= header", "took a frame"),  # a pair's row one too far
    # A refusal's words copied from behind the buffer. It crashes, and is the last: one process does for all.
    "client": ("client.c", "HEADER_BYTES, header.rows)", "HEADER_BYTES, header.rows + 70000)", "AddressSanitizer"),
}
"""By target: file, text, the bug in its place, and what the finding says."""


@compiled
def test_nothing_is_found(tmp_path: Path) -> None:
    reports = fuzz(build(tmp_path), dict.fromkeys(FRAMES, 3000), seed=2)
    for name in FRAMES:
        assert not reports[name]["findings"], name
        assert reports[name]["inputs"] == 3000
        assert reports[name]["edges"] > 50, "coverage is not seen"
        assert reports[name]["corpus"] > 20


@compiled
def test_planted_bugs_are_found(tmp_path: Path) -> None:
    bugs = {file: (right, wrong) for file, right, wrong, _ in PLANTED.values()}
    reports = fuzz(build(tmp_path, bugs), dict.fromkeys(FRAMES, 100_000), seed=3)
    for name, (_, _, _, said) in PLANTED.items():
        assert said in reports[name]["findings"][0]["what"]
        assert reports[name]["findings"][0]["input"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tmp_path: Path, name: str) -> None:
    """In this process, with what it raises as the failure."""
    kind, _ = targets()[name]
    target = kind(tmp_path)
    campaign = Campaign(target.run, random.Random(4))
    campaign.start(target.seeds())
    while campaign.inputs < 1500:
        campaign.step()


def test_mutations_stay_in_size_and_are_made_again_from_their_seed() -> None:
    def chain(seed: int) -> list[bytes]:
        dice, data = random.Random(seed), b"abc"
        return [data := mutated(data, b"defgh", dice) for _ in range(2000)]

    made = chain(1)
    assert made == chain(1)
    assert made != chain(2)
    assert len(set(made)) > 1500
    assert max(map(len, made)) <= 1 << 14
