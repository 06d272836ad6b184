"""The Ray Serve deployments, and the builder that makes an application of a config.

`build_app` and `APP_NAME` are looked up when they are asked for: parts that don't need Ray, such as a bare shard, don't
import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.deployments.builder import APP_NAME, build_app

__all__ = ["APP_NAME", "build_app"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from expertmesh.deployments import builder

        return getattr(builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
