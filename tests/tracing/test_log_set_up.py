"""Loggers of a process, set up as replicas and engines have them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_IN_PROCESS = """
import logging
from expertmesh.platform.logs import Origin, set_up
logging.getLogger("vllm").addHandler(logging.StreamHandler())
logging.getLogger("vllm").propagate = False
for _ in range(2):
    set_up(logging.INFO, {form!r}, Origin("experts", "r1"))
"""
_BY_VLLM = """
import json, logging, logging.config
from expertmesh.platform.logs import Origin, vllm_logging
logging.config.dictConfig(json.loads(json.dumps(vllm_logging("info", Origin("experts", "r1")))))
"""
_LINES = """
for name in ("expertmesh.x", "vllm.y"):
    logging.getLogger(name).warning("said by %s", name)
    logging.getLogger(name).debug("unsaid")
try:
    {}["key"]
except KeyError:
    logging.getLogger("expertmesh.x").exception("it failed")
"""


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code + _LINES], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


@pytest.mark.parametrize("code", [_IN_PROCESS.format(form="json"), _BY_VLLM])
def test_each_line_is_an_object_said_once(code: str) -> None:
    ours, vllms, failed = map(json.loads, said(code))
    assert (ours["message"], vllms["message"]) == ("said by expertmesh.x", "said by vllm.y")
    assert {(line["deployment"], line["replica"]) for line in (ours, vllms, failed)} == {("experts", "r1")}
    assert (failed["level"], failed["exception"].splitlines()[-1]) == ("error", "KeyError: 'key'")


def test_text_is_for_people() -> None:
    first, vllms, failed, *_ = said(_IN_PROCESS.format(form="text"))
    assert first.startswith("WARNING ")
    assert first.endswith(" expertmesh.x: said by expertmesh.x")
    assert vllms == "said by vllm.y", "vLLM's own lines stay as they are"
    assert failed.endswith("it failed")
