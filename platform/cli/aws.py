"""`expertmesh aws`: the CloudFormation stack around a mesh."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertmesh.platform.cli.shared import FAILED, NOT_WELL, Json, examples, print_json

if TYPE_CHECKING:  # boto3 is slow to import, which the other commands need not wait for
    from expertmesh.platform.aws import Event, Infrastructure, Plan, Stack, StackState

aws_app = typer.Typer(
    name="aws",
    help="Make, change and end what surrounds a mesh on AWS: bucket, file system, cache, roles, network.",
    no_args_is_help=True,
)

_SIGNS = {"Add": "+", "Modify": "~", "Remove": "-"}

File = Annotated[Path, typer.Argument(help="YAML file; see examples/aws/infrastructure.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
JsonAtTheEnd = Annotated[
    bool, typer.Option("--json", help="Print the outcome as JSON; steps and questions go to stderr.")
]
Write = Annotated[
    Path | None,
    typer.Option(help="Write the stack's ids here, for `expertmesh render ray-cluster --stack`.", show_default=False),
]
WriteHelm = Annotated[
    Path | None, typer.Option(help="Write the stack's ids here, for `helm install -f`.", show_default=False)
]


@aws_app.command(epilog=examples("expertmesh aws plan examples/aws/infrastructure/gpu.yaml"))
def plan(file: File, as_json: Json = False) -> None:
    """Show what `up` would change, and change nothing."""
    stack = _stack(file)
    planned = stack.plan()
    if as_json:
        print_json({**_of(stack.settings), "creates": planned.creates, "changes": [asdict(c) for c in planned.changes]})
    else:
        _tell_plan(stack.settings, planned, False)
    if planned.change_set is not None:
        stack.discard(planned)


@aws_app.command(
    epilog=examples(
        "expertmesh aws up infrastructure.yaml --write stack.yaml",
        "expertmesh aws up infrastructure.yaml --write-helm stack-values.yaml --yes --json",
    )
)
def up(
    file: File, yes: Yes = False, write: Write = None, write_helm: WriteHelm = None, as_json: JsonAtTheEnd = False
) -> None:
    """Show what would change, ask, change it, and tell each step."""
    stack = _stack(file)
    planned = stack.plan()
    _tell_plan(stack.settings, planned, as_json)
    if planned.change_set is None:
        state = stack.state()
    elif yes or _agreed("make these changes?", as_json):
        state = stack.execute(planned, lambda event: _tell_event(event, as_json))
    else:
        stack.discard(planned)
        raise typer.Exit(FAILED)
    if state is not None:
        _tell_state(stack.settings, state, as_json)
        _write(stack.settings, state, write, write_helm, as_json)


@aws_app.command(
    epilog=examples(
        "expertmesh aws status infrastructure.yaml", "expertmesh aws status infrastructure.yaml --write stack.yaml"
    )
)
def status(file: File, write: Write = None, write_helm: WriteHelm = None, as_json: JsonAtTheEnd = False) -> None:
    """Show the stack: its state, what is in it, and its outputs.

    The exit code is 0 if it is whole, else 3.
    """
    stack = _stack(file)
    state = stack.state()
    if state is None:
        if as_json:
            print_json({**_of(stack.settings), "status": None})
        else:
            typer.echo(f"stack {stack.settings.name} in {stack.settings.region}: not there")
        raise typer.Exit(NOT_WELL)
    for resource in state.resources if not as_json else ():
        typer.echo(f"  {resource.name:<20} {resource.kind:<38} {resource.status:<18} {resource.physical_id}")
    _tell_state(stack.settings, state, as_json)
    _write(stack.settings, state, write, write_helm, as_json)
    if state.status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise typer.Exit(NOT_WELL)


@aws_app.command(
    epilog=examples("expertmesh aws down infrastructure.yaml", "expertmesh aws down infrastructure.yaml --yes")
)
def down(file: File, yes: Yes = False, as_json: JsonAtTheEnd = False) -> None:
    """Delete the stack. The bucket and what is in it stay."""
    stack = _stack(file)
    state = stack.state()
    name = f"stack {stack.settings.name} in {stack.settings.region}"
    if state is None:
        print_json({**_of(stack.settings), "deleted": False}) if as_json else typer.echo(f"{name}: not there")
        return
    for resource in state.resources:
        stays = resource.kind == "AWS::S3::Bucket"
        line = f"  {' ' if stays else '-'} {resource.name:<20} {resource.kind}{' (stays)' if stays else ''}"
        typer.echo(line, err=as_json)
    if not yes and not _agreed(f"delete {name}?", as_json):
        raise typer.Exit(FAILED)
    stack.delete(lambda event: _tell_event(event, as_json))
    bucket = state.outputs.get("BucketName")
    if as_json:
        print_json({**_of(stack.settings), "deleted": True, "stays": f"s3://{bucket}" if bucket else None})
        return
    typer.echo(f"{name}: deleted")
    if bucket:
        typer.echo(f"what stays: s3://{bucket}")


def _agreed(question: str, as_json: bool) -> bool:
    """Ctrl-C and no answer are a no, so that a plan is discarded then too."""
    try:
        return typer.confirm(question, err=as_json)
    except typer.Abort:
        return False


def _stack(file: Path) -> Stack:
    from expertmesh.platform.aws import Stack, load_infrastructure

    return Stack(load_infrastructure(file))


def _of(settings: Infrastructure) -> dict[str, Any]:
    return {"stack": settings.name, "region": settings.region}


def _tell_plan(settings: Infrastructure, planned: Plan, aside: bool) -> None:
    """On stderr if `aside`, as the others."""
    name = f"stack {settings.name} in {settings.region}"
    if planned.change_set is None:
        typer.echo(f"{name}: nothing to change", err=aside)
        return
    typer.echo(f"{name} {'is made' if planned.creates else 'is changed'}:", err=aside)
    for change in planned.changes:
        replaced = {"no": "", "maybe": " (may be made anew)", "yes": " (made anew: what it holds is lost)"}
        sign = _SIGNS.get(change.action, "?")
        typer.echo(f"  {sign} {change.resource:<20} {change.kind}{replaced[change.replaced]}", err=aside)


def _tell_event(event: Event, aside: bool) -> None:
    reason = f": {event.reason}" if event.reason else ""
    typer.echo(f"  {event.status:<20} {event.resource}{reason}", err=aside)


def _tell_state(settings: Infrastructure, state: StackState, as_json: bool) -> None:
    if as_json:
        print_json({**_of(settings), **asdict(state)})
        return
    reason = f": {state.reason}" if state.reason else ""
    typer.echo(f"stack {settings.name} in {settings.region}: {state.status}{reason}")
    for name, value in state.outputs.items():
        typer.echo(f"  {name:<24} {value}")


def _write(
    settings: Infrastructure, state: StackState, write: Path | None, write_helm: Path | None, aside: bool
) -> None:
    from expertmesh.platform.aws import cluster_sections, helm_values
    from expertmesh.platform.config import yaml_text

    for path, of in ((write, cluster_sections), (write_helm, helm_values)):
        if path is not None:
            path.write_text(yaml_text.dump(of(settings, state.outputs)), encoding="utf-8")
            typer.echo(f"wrote {path}", err=aside)
