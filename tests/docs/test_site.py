"""The documentation site: built as `make check` builds it, and sufficient to itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import ROOT

_LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")
_BY_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    mkdocs = Path(sys.executable).with_name("mkdocs")
    done = subprocess.run(
        [mkdocs, "build", "--strict", "-q", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return folder


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 15
    assert styles
    for page in pages:
        text = page.read_text()
        assert not _LOADED.findall(text), page
        assert 'class="mermaid"' not in text, f"{page}: its script would come from outside"
    for style in styles:
        assert not _BY_STYLE.findall(style.read_text()), style
    for picture in site.rglob("*.svg"):
        assert not re.findall(r"(?:href|src)=\"(?!#)", picture.read_text()), picture


def test_the_reference_has_the_docstrings(site: Path) -> None:
    text = (site / "sdk.html").read_text()
    for words in (
        "Sets how many replicas there are to be",
        "mean over the layers",
        "Something that may be there again",
    ):
        assert words in text
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_the_builders_own_files_stay_out(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_dir"] == "build/site"
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
