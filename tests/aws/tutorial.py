"""The commands of a tutorial and what it says that they print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent

from tests.aws.conftest import ROOT

_BLOCK = re.compile(r"^( *)```\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """One command after `$ `, and the lines below it; `...` among them stands for any number of lines."""

    command: str
    output: str

    def agrees_with(self, printed: str) -> bool:
        """Whether `printed` is what the tutorial shows; how lines are wrapped doesn't matter."""
        parts = [" ".join(part.split()) for part in re.split(r"^\.\.\.$", self.output, flags=re.MULTILINE)]
        pattern = ".*".join(re.escape(part) for part in parts)
        return re.fullmatch(pattern, " ".join(printed.split())) is not None


def shown(page: str) -> Iterator[Shown]:
    """Every command of a page in docs/deployment that comes with its output, in order."""
    text = (ROOT / "docs" / "deployment" / page).read_text()
    for block in _BLOCK.finditer(text):
        for part in re.split(r"^\$ ", dedent(block[2]), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Shown(command, output.strip("\n"))
