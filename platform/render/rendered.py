"""What `expertmesh render ray-cluster FILE` writes: one call from the file to YAML texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.platform.config import yaml_text
from expertmesh.platform.render.cluster_file import load_cluster_file
from expertmesh.platform.render.ray_cluster import ray_cluster
from expertmesh.platform.render.serve_config import serve_config

_HEADER = "# Rendered by `expertmesh render ray-cluster`; change the source and render again.\n"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Two YAML documents that belong together."""

    ray_cluster: str
    """For `ray up`."""
    serve_config: str
    """For `serve deploy`, once the head node is up."""

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `ray-cluster.yaml` and `serve.yaml` into `folder`, which is made if needed. Returns both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        cluster, serve = folder / "ray-cluster.yaml", folder / "serve.yaml"
        cluster.write_text(self.ray_cluster, encoding="utf-8")
        serve.write_text(self.serve_config, encoding="utf-8")
        return cluster, serve


def render_ray_cluster(
    source: str | Path | Mapping[str, Any], beneath: str | Path | Mapping[str, Any] | None = None
) -> Rendered:
    """Render a cluster file (see `load_cluster_file`).

    Raises ConfigError with one line for each problem: what is wrong with the file, or, with the arithmetic, what
    doesn't fit on the nodes.
    """
    file = load_cluster_file(source, beneath)
    return Rendered(_HEADER + yaml_text.dump(ray_cluster(file)), _HEADER + yaml_text.dump(serve_config(file.mesh)))
