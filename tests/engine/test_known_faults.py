"""What vLLM would compute wrongly is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECK = """
import sys
from vllm import AsyncEngineArgs
from expertmesh.deployments.attention.known_faults import refuse_known_faults
from expertmesh.errors import ConfigError

arguments = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
try:
    refuse_known_faults(AsyncEngineArgs(model=sys.argv[1], **arguments).create_engine_config())
except ConfigError as error:
    print("refused:", error)
else:
    print("taken")
"""


@pytest.mark.engine
def test_latent_attention_with_plain_rotary_embeddings_is_refused_on_cpu(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    scaled = family("deepseek_v3")
    plain = tmp_path / "plain"
    shutil.copytree(scaled, plain)
    settings = json.loads((plain / "config.json").read_text())
    settings.pop("rope_scaling", None)
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (plain / "config.json").write_text(json.dumps(settings))

    def said(folder: Path) -> str:
        command = [sys.executable, "-c", CHECK, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]

    assert said(scaled) == "taken"
    assert said(plain).startswith("refused: model: multi-head latent attention")
