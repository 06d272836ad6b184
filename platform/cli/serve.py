"""`expertmesh serve` and `expertmesh demo`: a mesh in the foreground, with progress, gone on Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from expertmesh.platform.cli.shared import Changes, Json
from expertmesh.platform.config import MeshConfig, load_config, parse_changes

if TYPE_CHECKING:
    from expertmesh.deployments.local import LocalMesh

console = Console(stderr=True)

DEMO_PROMPT = "What is the capital of France, and what is it known for?"

Source = Annotated[str, typer.Argument(help="A YAML config, a checkpoint folder, or `demo`.", show_default=False)]


def effective_config(source: str | None, changes: list[str] | None) -> MeshConfig:
    """The config of a command line. Raises ConfigError."""
    return load_config(source).with_changes(parse_changes(changes or []))


def prepare_model(config: MeshConfig) -> Path:
    """The checkpoint's folder, after building the demo's with a progress bar where it isn't there yet."""
    from expertmesh.platform.checkpoints.source import model_folder

    with _bar() as progress:
        task = progress.add_task("checking the model", total=1.0, visible=False)

        def show(what: str, fraction: float) -> None:
            progress.update(task, description=what, completed=fraction, visible=True)

        return model_folder(config.model, show)


@contextmanager
def running_mesh(config: MeshConfig, stop: Callable[[], None] = lambda: None) -> Iterator[LocalMesh]:
    """A mesh that serves, with progress on the terminal while it starts; gone after the block."""
    prepare_model(config)
    from expertmesh.deployments.local import LocalMesh, find_cluster

    mesh = LocalMesh(config, find_cluster())
    try:
        with _bar() as progress:
            task = progress.add_task("starting", total=None)

            def show(states: dict[str, str]) -> None:
                stop()
                words = ", ".join(f"{name} {state}" for name, state in sorted(states.items()))
                progress.update(task, description=f"starting: {words}" if words else "starting Ray")

            mesh.start(show)
        yield mesh
    finally:
        with console.status("stopping"):
            mesh.close()


def serve(source: Source = "demo", changes: Changes = None) -> None:
    """Serve a model until Ctrl-C, on $RAY_ADDRESS or on a private Ray on this machine."""
    stopped = _stop_on_signals()
    config = effective_config(source, changes)

    def stop() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    try:
        with running_mesh(config, stop) as mesh:
            console.print(f"[bold green]ready[/]: {config.model.name} at {mesh.url}/v1   (Ctrl-C stops it)")
            if config.telemetry.metrics and mesh.metrics_url is not None:
                console.print(f"metrics at {mesh.metrics_url}")
            stopped.wait()
    except KeyboardInterrupt:
        pass


def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEMO_PROMPT,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Serve the demo model, ask it one question through the mesh, show the answer and who computed it, and stop."""
    from expertmesh.platform.cli.demo import ask_and_show

    stopped = _stop_on_signals()
    config = effective_config("demo", changes)

    def stop() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    with running_mesh(config, stop) as mesh:
        ask_and_show(mesh.url, config.model.name, prompt, as_json)


def _stop_on_signals() -> threading.Event:
    """Set by Ctrl-C and SIGTERM; a second one ends the process at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return stopped


def _bar() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)
