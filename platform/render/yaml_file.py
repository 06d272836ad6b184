"""Reading a user's YAML file whose top level is a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertmesh.errors import ConfigError
from expertmesh.platform.config import yaml_text
from expertmesh.platform.config.problems import kind_of


def read_mapping(path: Path, keys: str = "") -> Mapping[str, Any]:
    """The mapping in `path`; `keys` says in an error what it should hold. Raises ConfigError that names the file."""
    try:
        data = yaml_text.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: can't be read: {reason}") from None
    if not isinstance(data, Mapping):
        wanted = f"a mapping with {keys}" if keys else "a mapping"
        raise ConfigError(f"{path}: the top level is {kind_of(data)}; allowed: {wanted}")
    return data
