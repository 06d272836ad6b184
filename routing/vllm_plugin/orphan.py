"""Engine processes must not outlive the replica that started them, however it ended."""

from __future__ import annotations

import os
import select
import threading
from functools import cache

OWNER_VARIABLE = "EXPERTMESH_OWNER_PID"
"""Set by a replica for the processes that vLLM starts below it: the replica's pid."""


@cache
def follow_owner() -> None:
    """In a process below a replica: ends it as soon as the replica is gone, `kill -9` included.

    PR_SET_PDEATHSIG would follow the thread that started the process, not the replica.
    """
    owner = os.environ.get(OWNER_VARIABLE, "")
    if not owner.isdecimal() or int(owner) == os.getpid():
        return
    try:
        descriptor = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="follow-owner", daemon=True).start()
