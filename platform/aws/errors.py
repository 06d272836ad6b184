"""What AWS answered, or did not."""

from __future__ import annotations

from expertmesh.errors import ExpertMeshError


class AwsError(ExpertMeshError):
    """AWS refused a request, can't be reached, or could not carry out what it had accepted."""
