"""Run by mkdocs before it builds the site; see mkdocs.yml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_MIRROR = _ROOT / "build" / "reference" / "expertmesh"


def on_startup(**_: Any) -> None:
    """Links the package as the SDK reference is to read it: `platform` with an `__init__.py`.

    The real one must have none, and the reader of docstrings takes what has none for scripts.
    """
    platform = _MIRROR / "platform"
    platform.mkdir(parents=True, exist_ok=True)
    (platform / "__init__.py").touch()
    package = _ROOT / "src" / "expertmesh"
    for found in [*package.iterdir(), *(package / "platform").iterdir()]:
        link = (platform if found.parent.name == "platform" else _MIRROR) / found.name
        if found.name not in ("platform", "__pycache__") and not link.exists():
            link.symlink_to(found.resolve())
