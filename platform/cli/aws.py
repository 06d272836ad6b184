"""`expertmesh aws`: the CloudFormation stack around a mesh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # boto3 is slow to import, which the other commands need not wait for
    from expertmesh.platform.aws import Event, Infrastructure, Plan, Stack, StackState

aws_app = typer.Typer(
    name="aws",
    help="Make, change and end what surrounds a mesh on AWS: bucket, file system, cache, roles, network.",
    no_args_is_help=True,
)

NOT_THERE = 3
"""Exit code of `status` for a stack that isn't there, or isn't whole."""

_SIGNS = {"Add": "+", "Modify": "~", "Remove": "-"}

File = Annotated[Path, typer.Argument(help="YAML file; see examples/aws/infrastructure.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]
Write = Annotated[
    Path | None,
    typer.Option(help="Write the stack's ids here, for `expertmesh render ray-cluster --stack`.", show_default=False),
]
WriteHelm = Annotated[
    Path | None, typer.Option(help="Write the stack's ids here, for `helm install -f`.", show_default=False)
]


@aws_app.command()
def plan(file: File) -> None:
    """Show what `up` would change, and change nothing.

    Example: expertmesh aws plan examples/aws/infrastructure/gpu.yaml
    """
    stack = _stack(file)
    planned = stack.plan()
    _tell_plan(stack.settings, planned)
    if planned.change_set is not None:
        stack.discard(planned)


@aws_app.command()
def up(file: File, yes: Yes = False, write: Write = None, write_helm: WriteHelm = None) -> None:
    """Show what would change, ask, change it, and tell each step.

    Example: expertmesh aws up infrastructure.yaml --write stack.yaml
    """
    stack = _stack(file)
    planned = stack.plan()
    _tell_plan(stack.settings, planned)
    if planned.change_set is None:
        state = stack.state()
    elif yes or _agreed("make these changes?"):
        state = stack.execute(planned, _tell_event)
    else:
        stack.discard(planned)
        raise typer.Exit(1)
    if state is not None:
        _tell_state(stack.settings, state)
        _write(stack.settings, state, write, write_helm)


@aws_app.command()
def status(file: File, write: Write = None, write_helm: WriteHelm = None) -> None:
    """Show the stack: its state, what is in it, and its outputs.

    The exit code is 0 if it is whole, else 3.

    Example: expertmesh aws status infrastructure.yaml
    """
    stack = _stack(file)
    state = stack.state()
    if state is None:
        typer.echo(f"stack {stack.settings.name} in {stack.settings.region}: not there")
        raise typer.Exit(NOT_THERE)
    for resource in state.resources:
        typer.echo(f"  {resource.name:<20} {resource.kind:<38} {resource.status:<18} {resource.physical_id}")
    _tell_state(stack.settings, state)
    _write(stack.settings, state, write, write_helm)
    if state.status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        raise typer.Exit(NOT_THERE)


@aws_app.command()
def down(file: File, yes: Yes = False) -> None:
    """Delete the stack. The bucket and what is in it stay.

    Example: expertmesh aws down infrastructure.yaml
    """
    stack = _stack(file)
    state = stack.state()
    name = f"stack {stack.settings.name} in {stack.settings.region}"
    if state is None:
        typer.echo(f"{name}: not there")
        return
    for resource in state.resources:
        stays = resource.kind == "AWS::S3::Bucket"
        typer.echo(f"  {' ' if stays else '-'} {resource.name:<20} {resource.kind}{' (stays)' if stays else ''}")
    if not yes and not _agreed(f"delete {name}?"):
        raise typer.Exit(1)
    stack.delete(_tell_event)
    typer.echo(f"{name}: deleted")
    if "BucketName" in state.outputs:
        typer.echo(f"what stays: s3://{state.outputs['BucketName']}")


def _agreed(question: str) -> bool:
    """Ctrl-C and no answer are a no, so that a plan is discarded then too."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def _stack(file: Path) -> Stack:
    from expertmesh.platform.aws import Stack, load_infrastructure

    return Stack(load_infrastructure(file))


def _tell_plan(settings: Infrastructure, planned: Plan) -> None:
    name = f"stack {settings.name} in {settings.region}"
    if planned.change_set is None:
        typer.echo(f"{name}: nothing to change")
        return
    typer.echo(f"{name} {'is made' if planned.creates else 'is changed'}:")
    for change in planned.changes:
        replaced = {"no": "", "maybe": " (may be made anew)", "yes": " (made anew: what it holds is lost)"}
        sign = _SIGNS.get(change.action, "?")
        typer.echo(f"  {sign} {change.resource:<20} {change.kind}{replaced[change.replaced]}")


def _tell_event(event: Event) -> None:
    reason = f": {event.reason}" if event.reason else ""
    typer.echo(f"  {event.status:<20} {event.resource}{reason}")


def _tell_state(settings: Infrastructure, state: StackState) -> None:
    reason = f": {state.reason}" if state.reason else ""
    typer.echo(f"stack {settings.name} in {settings.region}: {state.status}{reason}")
    for name, value in state.outputs.items():
        typer.echo(f"  {name:<24} {value}")


def _write(settings: Infrastructure, state: StackState, write: Path | None, write_helm: Path | None) -> None:
    from expertmesh.platform.aws import cluster_sections, helm_values
    from expertmesh.platform.config import yaml_text

    for path, of in ((write, cluster_sections), (write_helm, helm_values)):
        if path is not None:
            path.write_text(yaml_text.dump(of(settings, state.outputs)), encoding="utf-8")
            typer.echo(f"wrote {path}")
