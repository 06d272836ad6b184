"""`expertmesh keys`: make, list and revoke API keys in a key file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from expertmesh.errors import ConfigError
from expertmesh.platform.access import INFER, Key, KeyRing, new_token
from expertmesh.platform.access.file import change_keys, read_keys
from expertmesh.platform.cli.shared import Json, examples, print_json

keys_app = typer.Typer(name="keys", help="Make, list and revoke API keys.", no_args_is_help=True)

KEYS_FILE_ENV = "EXPERTMESH_KEYS_FILE"
_OPTIONS: dict[int | str, str] = {"scopes": "scope"}
"""Of fields that are called otherwise."""
_NAMES = "letters, digits and . _ @ -, a letter or digit first, at most 64"
_ALLOWED = {"name": _NAMES, "tenant": _NAMES}
"""Of fields whose pattern says it less plainly."""

File = Annotated[
    Path,
    typer.Option("--file", envvar=KEYS_FILE_ENV, help="The key file, as in ingress.keys_file.", show_default=False),
]


@keys_app.command(
    epilog=examples(
        "expertmesh keys create team-a --file keys.json --requests-per-minute 600",
        "expertmesh keys create ops --file keys.json --scope infer --scope admin",
    )
)
def create(
    name: Annotated[str, typer.Argument(help="What to call it: letters, digits and . _ @ -")],
    file: File,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="infer (the OpenAI API) or admin (/mesh); may be repeated.", show_default="infer"),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Whose key it is: only keys of one tenant share cached prompts.", show_default="the key's name"
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Requests a minute at most, at each ingress replica.", show_default="any number")
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(help="Requests at once at most, at each ingress replica.", show_default="any number")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key, add it to the file (which is made if it isn't there), and print it. It can't be shown again."""
    made = new_token()
    key = _key(
        id=made.id,
        name=name,
        scopes=list(dict.fromkeys(scopes or [INFER])),
        tenant=name if tenant is None else tenant,
        sha256=made.digest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        requests_per_minute=requests_per_minute,
        concurrent_requests=concurrent_requests,
    )
    change_keys(file, lambda keys: keys.with_key(key), create=True)
    print_json({"key": made.token, **_shown(key)}) if as_json else typer.echo(made.token)


@keys_app.command("list", epilog=examples("expertmesh keys list --file keys.json"))
def list_keys(file: File, as_json: Json = False) -> None:
    """List the keys in the file, without what is secret about them."""
    keys = read_keys(file)
    if as_json:
        print_json([_shown(key) for key in keys])
        return
    for line in _lines(keys):
        typer.echo(line)


@keys_app.command(epilog=examples("expertmesh keys revoke team-a --file keys.json"))
def revoke(
    name: Annotated[str, typer.Argument(help="Name or id of the key.")], file: File, as_json: Json = False
) -> None:
    """Remove a key from the file. Ingress replicas refuse it from the next request on; what runs is finished."""
    change_keys(file, lambda keys: keys.without(name))
    print_json({"revoked": name}) if as_json else typer.echo(f"revoked {name}")


def _key(**fields: Any) -> Key:
    try:
        return Key(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = first["loc"][0]
        allowed = _ALLOWED.get(str(field))
        raise ConfigError(
            f"{_OPTIONS.get(field, field)}: {f'allowed: {allowed}' if allowed else first['msg']}"
        ) from None


def _shown(key: Key) -> dict[str, Any]:
    return key.model_dump(exclude={"sha256"})


def _lines(keys: KeyRing) -> list[str]:
    rows = [("name", "id", "scopes", "tenant", "per minute", "at once", "created")]
    for key in keys:
        limits = [str(limit or "-") for limit in (key.requests_per_minute, key.concurrent_requests)]
        rows.append((key.name, key.id, ",".join(key.scopes), key.tenant, limits[0], limits[1], key.created))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
