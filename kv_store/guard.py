"""Runs an embedded server for as long as its owner lives. A script of its own: it imports nothing but the library.

    python -I guard.py OWNER_PID

and on standard input one line of JSON: {"binary", "folder", "config", "link"}

The server ends, and its folder and the link to that go, as soon as the owner closes our standard input or is gone,
`kill -9` included (a pidfd tells, even if a child of the owner holds the pipe open). If we are killed ourselves the
kernel ends the server (PR_SET_PDEATHSIG). A server that ends by itself is started again, empty, unless it never
was one: the first that ends as soon as it has begun ends us too.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_LEAST_LIFE_S = 1.0
"""A first server that ends sooner would end again."""
_PAUSE_MS = 500
"""Before a server is started again."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(task: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            [task["binary"], "-"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=folder,
            preexec_fn=_die_with_parent,  # this process has one thread
        )
    assert server.stdin is not None
    server.stdin.write(task["config"].encode())  # by pipe: a password has no place in a file or an argument list
    server.stdin.close()
    return server


def main() -> int:
    """Returns the server's exit status if it does not stay, else 0."""
    owner = os.pidfd_open(int(sys.argv[1]))
    orders = open(0, "rb", buffering=0)  # noqa: SIM115 (for as long as we live; poll must see all that is left)
    task = json.loads(orders.readline())
    folder = Path(task["folder"])
    watched = select.poll()
    for descriptor in (owner, orders.fileno()):
        watched.register(descriptor, select.POLLIN | select.POLLHUP)
    begin = time.monotonic()
    server = _start(task, folder)
    while True:
        ended = os.pidfd_open(server.pid)
        watched.register(ended, select.POLLIN)
        watched.poll()
        watched.unregister(ended)
        os.close(ended)
        status = server.poll()
        if status is None:
            break
        if time.monotonic() - begin < _LEAST_LIFE_S:
            return status
        if watched.poll(_PAUSE_MS):
            break
        server = _start(task, folder)
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
    link = Path(task["link"] or os.devnull)
    if link.is_symlink() and link.readlink() == folder:
        link.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
