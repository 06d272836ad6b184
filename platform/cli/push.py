"""`expertmesh push`: a checkpoint from a folder to S3."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from expertmesh.platform.cli.shared import Json, print_json

console = Console(stderr=True)


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint's folder.", show_default=False)],
    target: Annotated[str, typer.Argument(help="s3://bucket/prefix", show_default=False)],
    endpoint_url: Annotated[str | None, typer.Option(help="Address of an S3 service other than AWS's.")] = None,
    region: Annotated[str | None, typer.Option(help="Region; else that of the environment or profile.")] = None,
    requester_pays: Annotated[bool, typer.Option(help="Pay for requests to a bucket whose owner doesn't.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a checkpoint to S3, in parts, with checksums, as Intelligent-Tiering objects.

    A broken checkpoint is refused first. Files that are there with the same size and checksum are left alone.
    """
    from expertmesh.platform.checkpoints import check_checkpoint
    from expertmesh.platform.weights.push import push as upload
    from expertmesh.platform.weights.s3 import S3Settings
    from expertmesh.platform.weights.s3_location import S3Location

    location = S3Location.parse(target)
    settings = S3Settings(endpoint_url=endpoint_url, region=region, requester_pays=requester_pays)
    checkpoint = check_checkpoint(folder)
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, lock = progress.add_task("uploading", total=None), threading.Lock()

        def show(done: int, total: int) -> None:
            with lock:
                progress.update(task, completed=done, total=total)

        pushed = upload(folder, [file.path.name for file in checkpoint.files], location, settings, show)
    if as_json:
        print_json({"url": location.url(), **asdict(pushed)})
        return
    typer.echo(
        f"{location.url()}: {len(pushed.uploaded)} files uploaded ({pushed.bytes_uploaded} bytes), "
        f"{len(pushed.skipped)} were there already"
    )
