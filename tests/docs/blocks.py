"""The code blocks of README.md and docs/, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SHELL = ("", "console", "sh", "bash", "shell")
_COMMAND = re.compile(r"(?:^|&& )\s*(?:[A-Z_]+=\S+ )*((?:\S+/)?expertmesh\b.*)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    page: str
    """Path below the repository."""
    line: int
    info: str
    """What stands behind the fence: the language, and more."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*infos: str) -> list[Block]:
    """Those of every page whose fence says one of `infos`."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[2], dedent(match[3])))
    return [block for block in found if block.info in infos]


@dataclass(frozen=True, slots=True)
class Line:
    """One command line of ours, from `expertmesh` on."""

    block: Block
    text: str

    def __str__(self) -> str:
        return f"{self.block}: {self.text}"


def command_lines() -> Iterator[Line]:
    """In the order of the pages. Where a block shows what commands print, the commands are the lines after `$ `."""
    for block in blocks(*_SHELL):
        lines = block.text.replace("\\\n", " ").splitlines()
        shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in shown or lines:
            found = _COMMAND.search(line)
            if found is not None:
                yield Line(block, found[1])
