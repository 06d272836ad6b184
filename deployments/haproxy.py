"""HAProxy in the place of Serve's own HTTP proxy, for a Ray that the mesh starts itself.

Ray brings the binary along and starts it; requests go from it to the ingress replicas' own HTTP servers. Ray's
processes read these settings from their environment when they start, so on a cluster that runs already its nodes must
have had RAY_SERVE_ENABLE_HA_PROXY=1.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

_MOST_CONNECTIONS = 4096
_FILES_A_CONNECTION = 4
"""Descriptors, and as many again for connections that a reloaded HAProxy still serves."""


def environment(folder: Path) -> dict[str, str]:
    """For Ray's processes. folder: of this mesh alone, with a short name; HAProxy's files and sockets go there."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_CONNECTIONS if files < 0 else min(_MOST_CONNECTIONS, files // _FILES_A_CONNECTION)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_MAXCONN": str(most),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def set_for_children(variables: dict[str, str]) -> Iterator[None]:
    """Processes that are started meanwhile have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
