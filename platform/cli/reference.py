"""`python -m expertmesh.platform.cli.reference > docs/cli.md` writes the reference of the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any

import typer

from expertmesh.platform.cli import app
from expertmesh.platform.cli.shared import EXIT_CODES, HEADING

_INTRODUCTION = """\
# Command line

<!-- Generated: python -m expertmesh.platform.cli.reference > docs/cli.md -->

`expertmesh COMMAND --help` says the same as this page. What a command prints goes to stdout, as JSON with `--json`;
progress, questions and errors go to stderr, one line a problem, with what to do about it.

| exit code | meaning |
| --- | --- |
{exit_codes}

| environment | what for |
| --- | --- |
| `EXPERTMESH_URL` | the mesh's URL, where `--url` is not given; else http://127.0.0.1:8000 |
| `EXPERTMESH_API_KEY`, `EXPERTMESH_API_KEY_FILE` | the key that is shown to the mesh, or a file that holds it |
| `EXPERTMESH_KEYS_FILE` | the key file of `expertmesh keys` |
| `EXPERTMESH_CACHE` | where the demo model and downloaded weights are kept; else `~/.cache/expertmesh` |
| `EXPERTMESH_SECRET` | the cluster's secret, where `routing.secret_file` names no file |
| `RAY_ADDRESS` | the Ray cluster that `serve` and `demo` use; without it they start one of their own |

Tab completes commands, options and the keys of `--set`, in bash, zsh, fish and PowerShell:

```console
$ expertmesh --install-completion          # for the shell that runs it, from its next start on
$ expertmesh --show-completion             # print the script instead
```
"""


def cli_markdown() -> str:
    """The whole reference: what holds for all commands, then each with its arguments, options and examples."""
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    sections = [_section(words, command) for words, command in commands()]
    return "\n".join([_INTRODUCTION.format(exit_codes=codes), *sections])


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, not the groups, as it is typed and as Typer has it."""
    yield from _below("expertmesh", typer.main.get_command(app))


def examples_of(command: Any) -> list[str]:
    """The command lines in the examples of its help."""
    heading, *lines = (command.epilog or "").splitlines() or [""]
    return [line.strip() for line in lines] if heading == HEADING else []


def _below(words: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        here = f"{words} {name}"
        if hasattr(command, "commands"):
            yield from _below(here, command)
        else:
            yield here, command


def _section(words: str, command: Any) -> str:
    usage = " ".join([words, *command.collect_usage_pieces(_context(words, command))])
    rows = "\n".join(_row(parameter) for parameter in command.params)
    parts = [f"## {words}", cleandoc(command.help), f"```text\n{usage}\n```"]
    if rows:
        parts.append(f"| argument or option | meaning |\n| --- | --- |\n{rows}")
    parts.append("```console\n" + "\n".join(f"$ {line}" for line in examples_of(command)) + "\n```")
    return "\n\n".join(parts) + "\n"


def _context(words: str, command: Any) -> Any:
    return command.make_context(words, [], resilient_parsing=True)


def _row(parameter: Any) -> str:
    name = f"`{parameter.metavar or parameter.name}`"
    if parameter.param_type_name == "option":
        value = f" {parameter.metavar}" if parameter.metavar else ""
        name = ", ".join(f"`{option}{value}`" for option in parameter.opts)
    notes = []
    if parameter.required:
        notes.append("required")
    if isinstance(parameter.show_default, str):
        notes.append(f"default: {parameter.show_default}")
    elif parameter.show_default and parameter.default not in (None, False):
        notes.append(f"default: `{parameter.default}`")
    if parameter.envvar:
        notes.append(f"environment: `{parameter.envvar}`")
    meaning = (parameter.help or "") + (f" ({'; '.join(notes)})" if notes else "")
    return f"| {name} | {meaning} |"


if __name__ == "__main__":
    sys.stdout.write(cli_markdown())
