"""The processes of a mesh on this machine, to be killed or held still."""

from __future__ import annotations

import psutil


def replica_processes(deployment: str) -> list[psutil.Process]:
    """Those of a deployment's replicas, of the mesh that this process has started."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:expertmesh:{deployment}" in " ".join(process.cmdline())
    ]
