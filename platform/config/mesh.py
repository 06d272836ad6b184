"""The whole configuration of a mesh."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from expertmesh.errors import ConfigError
from expertmesh.platform.config import yaml_text
from expertmesh.platform.config.fields import Loading, Section
from expertmesh.platform.config.problems import Scan, explain, report, show
from expertmesh.platform.config.sections import (
    AttentionConfig,
    AutoscalingConfig,
    ExpertsConfig,
    IngressConfig,
    KVStoreConfig,
    ModelConfig,
    RoutingConfig,
    TelemetryConfig,
)


class MeshConfig(Section):
    """Everything that a mesh is built from. Frozen; `load_config` reads one, `with_changes` makes a changed one."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The model that is served.")
    attention: AttentionConfig = Field(
        default_factory=AttentionConfig,
        description="Attention replicas: vLLM engines with all of the model but its routed experts.",
    )
    experts: ExpertsConfig = Field(
        default_factory=ExpertsConfig,
        description="Expert shards. With `mode: colocated` the section's other keys are not used.",
    )
    routing: RoutingConfig = Field(
        default_factory=RoutingConfig, description="How tokens travel between attention replicas and expert shards."
    )
    kv_store: KVStoreConfig = Field(
        default_factory=KVStoreConfig, description="The store of KV blocks that attention replicas share."
    )
    autoscaling: AutoscalingConfig = Field(
        default_factory=AutoscalingConfig, description="Which deployments follow the load."
    )
    ingress: IngressConfig = Field(default_factory=IngressConfig, description="The HTTP front with the OpenAI API.")
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, description="Logs and load statistics.")

    def to_yaml(self) -> str:
        """The effective configuration, defaults and all, as YAML that `load_config` reads back to an equal one."""
        return yaml_text.dump(self.model_dump(mode="json"))

    def with_changes(self, changes: Mapping[str, Any]) -> MeshConfig:
        """A copy with other values at dotted paths, in the order given: `{"experts.shards": 3}`.

        Values are Python values (`parse_changes` makes them from text); `model` with a text value changes
        `model.source`. The result is validated as by `load_config`, with relative paths against the working directory.
        Raises ConfigError.
        """
        data = self.model_dump()
        for path, value in changes.items():
            _change(data, "model.source" if path == "model" and isinstance(value, str | Path) else path, value)
        return build(data, Path.cwd())


def _change(data: dict[str, Any], path: str, value: object) -> None:
    *parents, last = keys = path.split(".")
    if not all(keys):
        raise ConfigError(f"{path!r} is not a dotted path; an example: experts.shards")
    section = data
    for depth, key in enumerate(parents, start=1):
        inner = section.get(key)
        if inner is None:  # not there, or an optional section that is off
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {'.'.join(keys[:depth])} is {show(inner)}, which has no keys below it")
        section = inner
    section[last] = value


@functools.cache
def _schema() -> dict[str, Any]:
    schema = MeshConfig.model_json_schema()
    model = schema["properties"]["model"]
    schema["properties"]["model"] = {
        "anyOf": [{"type": "string", "minLength": 1}, {"$ref": model.pop("$ref")}],
        **model,
    }
    return schema


def config_schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors and charts. Checks across fields are not in it."""
    return copy.deepcopy(_schema())


def build(data: Mapping[Any, Any], base: Path) -> MeshConfig:
    """Validate `data` for use on this machine, with relative paths against `base`.

    Raises ConfigError with one line for each problem, each starting with the dotted path.
    """
    scan = Scan(data)
    problems = list(scan.problems)
    try:
        config = MeshConfig.model_validate(scan.data, context=Loading(base=base))
    except ValidationError as error:
        problems += explain(error, _schema())
    if problems:
        raise ConfigError(report(problems))
    return config
