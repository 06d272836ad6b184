"""What the demo model promises: sparse, and nearly as good as the dense original on text that it has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.platform.checkpoints import check_checkpoint, expert_layout
from expertmesh.platform.checkpoints.demo.evaluate import evaluate


@pytest.mark.engine
def test_the_demo_is_sparse_and_nearly_as_good_as_the_original(demo_folder: Path) -> None:
    assert expert_layout(check_checkpoint(demo_folder)).num_experts >= 16
    measured = evaluate(demo_folder)
    assert measured.top_k < measured.experts
    assert measured.routed_share >= 0.5
    assert measured.held_out_tokens >= 2000
    assert measured.ratio <= 1.25
