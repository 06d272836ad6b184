"""From one file (`mesh:` and `cluster:`) to what other tools start: Ray's cluster launcher and Ray Serve.

Light to import: neither torch, Ray, vLLM nor boto3. Nothing here asks AWS.
"""

from __future__ import annotations

from expertmesh.platform.render.cluster_file import ClusterFile, load_cluster_file
from expertmesh.platform.render.ray_cluster import ray_cluster
from expertmesh.platform.render.rendered import Rendered, render_ray_cluster
from expertmesh.platform.render.serve_config import serve_config

__all__ = ["ClusterFile", "Rendered", "load_cluster_file", "ray_cluster", "render_ray_cluster", "serve_config"]
