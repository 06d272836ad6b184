"""`expertmesh top`: the console's picture in a terminal, until q or Ctrl-C."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from expertmesh.errors import ExpertMeshError
from expertmesh.platform.cli.connected import Url, connected, in_one_line
from expertmesh.platform.cli.top_page import View, page

if TYPE_CHECKING:  # OpenAI's package takes a second to import, which the other commands need not wait for
    from expertmesh.platform.client import Client, MeshEvent

_PERIOD_S = 2.0
_KEPT_EVENTS = 200
_RETRY_S = 2.0
_PIPE_WIDTH = 120


def top(
    url: Url = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
) -> None:
    """Watch a running mesh: shards, replicas, hot experts, balancedness, moves and events. q or Ctrl-C ends it."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    with connected(url) as client:
        if once or not console.is_terminal:
            console.print(page(_look(client, list(client.mesh.events(follow=False))), None))
            return
        _watch(client, console)


def _look(client: Client, events: list[MeshEvent]) -> View:
    status = client.mesh.status()
    return View(status, client.mesh.placement(), client.mesh.heat(), client.mesh.history(time.time() - 60), events)


def _watch(client: Client, console: Console) -> None:
    """Raises if the mesh can't be reached at first; one that goes away later is waited for."""
    events: deque[MeshEvent] = deque(maxlen=_KEPT_EVENTS)
    view = _look(client, [])
    threading.Thread(target=_follow, args=(client, events), name="mesh-events", daemon=True).start()
    with (
        _keys() as pressed,
        suppress(KeyboardInterrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(page(view, console.height), refresh=True)
            if pressed(_PERIOD_S) in ("q", "Q"):
                return
            try:
                view = _look(client, list(events))
            except ExpertMeshError as error:
                live.update(Text(in_one_line(error), "red"), refresh=True)
                if pressed(_RETRY_S) in ("q", "Q"):
                    return


def _follow(client: Client, events: deque[MeshEvent]) -> None:
    with suppress(ExpertMeshError):  # whoever looks at the mesh says what is wrong
        for event in client.mesh.events():
            events.append(event)


def _nothing(seconds: float) -> str:
    """No key, as there is no keyboard."""
    time.sleep(seconds)
    return ""


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed, without Enter: what is given waits so many seconds for one, "" if there is none."""
    import termios
    import tty

    if not sys.stdin.isatty():
        yield _nothing
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([terminal], [], [], seconds)
        return os.read(terminal, 1).decode(errors="ignore") if ready else ""

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
