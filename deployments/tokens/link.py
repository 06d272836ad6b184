"""What both ends share."""

from __future__ import annotations

from expertmesh.errors import Unavailable

PROTOCOL = "tokens-1"
"""What an inbox introduces itself with; another number for other messages."""


class LinkLost(Unavailable):
    """The connection between a replica and the ingress that asked it is gone, or can't be made; both may be well."""
