"""Runs an embedded server for as long as its owner lives. A script of its own: it imports nothing but the library.

    python -I guard.py OWNER_PID

and on standard input one line of JSON: {"binary", "folder", "config", "link"}

The server ends, and its folder and the link to that go, as soon as the owner closes our standard input or is gone,
`kill -9` included (a pidfd tells, even if a child of the owner holds the pipe open). If we are killed ourselves the
kernel ends the server (PR_SET_PDEATHSIG). A server that ends by itself is started again, empty, unless it had only
just begun.
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
"""A server that ends sooner would end again."""


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
    while True:
        begin = time.monotonic()
        server = _start(task, folder)
        ended = os.pidfd_open(server.pid)
        poll = select.poll()
        for descriptor in (owner, orders.fileno(), ended):
            poll.register(descriptor, select.POLLIN | select.POLLHUP)
        poll.poll()
        os.close(ended)
        status = server.poll()
        if status is None:
            break
        if time.monotonic() - begin < _LEAST_LIFE_S:
            return status
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
    link = Path(task["link"] or os.devnull)
    if link.is_symlink() and link.readlink() == folder:
        link.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
