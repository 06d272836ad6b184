"""The Ray Serve deployments, and the builder that makes an application of a config."""

from expertmesh.deployments.builder import APP_NAME, build_app

__all__ = ["APP_NAME", "build_app"]
