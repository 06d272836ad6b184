"""Memory that a shard may still fill with experts."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Free memory of the current GPU; without one, of this host, or of this container where that is less.

    What a container's files keep cached counts as free: the kernel gives it up first.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    host = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    available = int(host.split()[1]) << 10
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (cgroup / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration):  # no container, or control groups of version 1
        return available
    return available if limit == "max" else min(available, int(limit) - used + cached)
