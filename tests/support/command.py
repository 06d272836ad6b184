"""`expertmesh` in this process, from the words of its command line to its exit code."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from expertmesh.platform.cli import run


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def expertmesh(*words: str) -> Done:
    """As the console script, errors included; nothing can be typed in answer."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run(words)
        except SystemExit as exit_:  # completion ends so
            code = int(exit_.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
