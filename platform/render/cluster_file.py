"""The file that `expertmesh render` reads: `mesh:` (the configuration) and `cluster:` (the nodes)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from expertmesh.errors import ConfigError
from expertmesh.platform.config import DEMO, MeshConfig, config_schema
from expertmesh.platform.config.fields import Section
from expertmesh.platform.config.problems import Scan, explain, report
from expertmesh.platform.render.aws_sections import AwsCluster
from expertmesh.platform.render.yaml_file import read_mapping

_KEYS = ("mesh", "cluster")
_Kind = TypeVar("_Kind", bound=BaseModel)


class ClusterFile(Section):
    """A mesh and the cluster that it runs on."""

    mesh: MeshConfig
    cluster: AwsCluster


def load_cluster_file(
    source: str | Path | Mapping[str, Any], beneath: str | Path | Mapping[str, Any] | None = None
) -> ClusterFile:
    """Read and validate a file, or a mapping of the same form; what it leaves out is taken from `beneath`.

    `beneath` is of the same form too, such as what `expertmesh aws up --write` wrote. Mappings are merged key by key;
    everything else in `source`, lists too, takes the place of what is beneath.

    Paths in it are those of the nodes, so this machine's files are not looked at. Raises ConfigError with one line for
    each problem, each starting with the dotted path.
    """
    data = _mapping(source)
    if beneath is not None:
        data = _merged(_mapping(beneath), data)
    unknown = sorted(str(key) for key in set(data) - set(_KEYS))
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown key; allowed: {', '.join(_KEYS)}")
    if "cluster" not in data:
        raise ConfigError("cluster: missing; it says on which nodes the mesh runs")
    problems: list[str] = []
    mesh = _section(MeshConfig, data.get("mesh") or {}, "mesh", config_schema(), problems)
    cluster = _section(AwsCluster, data["cluster"], "cluster", AwsCluster.model_json_schema(), problems)
    if mesh is not None:
        problems += [f"mesh.{line}" for line in _not_for_a_cluster(mesh)]
    if problems or mesh is None or cluster is None:
        raise ConfigError(report(problems))
    return ClusterFile(mesh=mesh, cluster=cluster)


def _mapping(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    return source if isinstance(source, Mapping) else read_mapping(Path(source), " and ".join(_KEYS))


def _merged(beneath: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(beneath)
    for key, value in above.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _section(kind: type[_Kind], data: object, name: str, schema: dict[str, Any], problems: list[str]) -> _Kind | None:
    scan = Scan(data)
    problems += [f"{name}.{line}" for line in scan.problems]
    try:
        return kind.model_validate(scan.data)
    except ValidationError as error:
        problems += [f"{name}.{line}" for line in explain(error, schema)]
        return None


def _not_for_a_cluster(mesh: MeshConfig) -> list[str]:
    """Settings that hold on one machine only."""
    lines = []
    source = mesh.model.source
    if source != DEMO and not source.startswith(("/", "s3://")):
        lines.append(f"model.source: {source!r} is a relative path; nodes need an absolute one, s3://... or {DEMO!r}")
    if mesh.routing.transport == "unix":
        lines.append("routing.transport: 'unix' does not reach other nodes; allowed: auto, tcp")
    if mesh.kv_store.url.startswith(("embedded", "unix:")):
        lines.append(
            f"kv_store.url: {mesh.kv_store.url!r} is on one machine; allowed: off, redis://HOST[:PORT], rediss://HOST[:PORT]"
        )
    return lines
