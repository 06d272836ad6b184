"""Where a configuration comes from: a YAML file, a mapping, a model, or `--set` options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from expertmesh.errors import ConfigError
from expertmesh.platform.config import yaml_text
from expertmesh.platform.config.mesh import MeshConfig, build
from expertmesh.platform.config.problems import dotted, kind_of
from expertmesh.platform.config.sections import DEMO
from expertmesh.platform.weights.s3_location import S3_SCHEME

MAX_FILE_BYTES = 1 << 20


def load_config(source: str | Path | Mapping[str, Any] | None) -> MeshConfig:
    """The validated configuration from `source`.

    * None: all defaults, with the demo model.
    * A mapping: as in YAML.
    * The text `demo`, the path of a folder, or `s3://bucket/prefix`: all defaults, with this model.
    * The path of a file: YAML. Relative paths in it count from the file's folder, everywhere else from the working
      directory.

    Raises ConfigError with one line for each problem, each starting with the dotted path of the field (for YAML that
    can't be read, with the file, line and column).
    """
    if source is None or source == DEMO:
        return build({}, Path.cwd())
    if isinstance(source, Mapping):
        return build(source, Path.cwd())
    if not isinstance(source, str | Path):
        raise ConfigError(f"a configuration is a path, a mapping or a model, not {kind_of(source)}")
    if isinstance(source, str) and source.startswith(S3_SCHEME):
        return build({"model": source}, Path.cwd())
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (Path.expanduser raises for users that don't exist)
    if path.is_dir():
        return build({"model": path}, Path.cwd())
    return build(_read_mapping(path), path.absolute().parent)


def parse_changes(options: Iterable[str]) -> dict[str, Any]:
    """The changes for `MeshConfig.with_changes` from texts like `experts.shards=3`, whose values are YAML.

    Raises ConfigError for a text without `=` or a value that isn't YAML; the message doesn't hold the value.
    """
    changes: dict[str, Any] = {}
    for option in options:
        path, equals, text = option.partition("=")
        if not equals or not path.strip():
            raise ConfigError("a change is written KEY=VALUE, for example experts.shards=3")
        changes[path.strip()] = yaml_text.parse(text, dotted(path.strip().split(".")))
    return changes


def _read_mapping(path: Path) -> Mapping[Any, Any]:
    data = yaml_text.parse(_read_text(path), str(path))
    if data is None:  # nothing but comments
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path}: the top level is {kind_of(data)}; allowed: a mapping of sections, such as `model: demo`"
        )
    return data


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        allowed = f"a YAML file, a checkpoint folder, {S3_SCHEME}..., or {DEMO!r}"
        raise ConfigError(f"{path}: does not exist; allowed: {allowed}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{str(path)!r}: can't be read: {reason}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes; is it a configuration?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not UTF-8") from None
