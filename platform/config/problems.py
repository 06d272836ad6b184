"""From what a user wrote to lines that say what is wrong with it: one line a problem, each with its dotted path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from expertmesh.platform.config import schema as schemas
from expertmesh.platform.config.fields import PROBLEM
from expertmesh.platform.config.secret import SECRET_ENV, looks_like_secret

MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_LINES = 50

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_:/-]+")
_URL_CREDENTIALS = re.compile(r"://\S*@")
_SECRET_FILES = (("routing", "secret_file"), ("kv_store", "password_file"))

Keys = tuple[object, ...]


def dotted(path: Iterable[object]) -> str:
    """`("experts", "shards")` as `experts.shards`; keys with odd characters are quoted."""
    return ".".join(key if _PLAIN_KEY.fullmatch(key) else repr(key) for key in map(str, path))


def report(lines: Sequence[str]) -> str:
    """The lines as one message, cut where nobody would read on."""
    rest = len(lines) - MAX_LINES
    return "\n".join([*lines[:MAX_LINES], *([f"and {rest} more problems"] if rest > 0 else [])])


class _TooLarge(Exception):
    pass


class Scan:
    """A copy of a user's data without what must not go further, and the problems found on the way.

    Keys that look like secrets are left out with their values, so that no later message can hold one. Data that refers
    to itself, or that grows without bound through YAML aliases, is refused before anything walks it.
    """

    def __init__(self, data: object) -> None:
        self.problems: list[str] = []
        self.data: object = {}
        self._left = MAX_VALUES
        try:
            self.data = self._copy(data, ())
        except _TooLarge as error:
            self.problems = [str(error)]

    def _copy(self, value: object, path: Keys) -> object:
        self._left -= 1
        if self._left < 0 or len(path) > MAX_DEPTH:
            raise _TooLarge(
                f"{dotted(path[:2]) or 'configuration'}: refers to itself or is too large; "
                f"allowed: {MAX_VALUES} values, {MAX_DEPTH} levels deep"
            )
        if isinstance(value, Mapping):
            return {key: self._copy(inner, (*path, key)) for key, inner in value.items() if self._keep(key, path)}
        if isinstance(value, list | tuple):
            return [self._copy(inner, (*path, index)) for index, inner in enumerate(value)]
        if isinstance(value, str) and not _encodable(value):
            self.problems.append(f"{dotted(path)}: holds half a surrogate pair, which is no Unicode text")
            return ""
        return value

    def _keep(self, key: object, path: Keys) -> bool:
        if isinstance(key, str) and not _encodable(key):
            self.problems.append(
                f"{dotted((*path, key))}: the key holds half a surrogate pair, which is no Unicode text"
            )
            return False
        here = (*path, key)
        if here in _SECRET_FILES or not looks_like_secret(str(key)):
            return True
        self.problems.append(
            f"{dotted(here)}: a secret does not belong in the configuration; name a file that holds it in "
            f"routing.secret_file, or set {SECRET_ENV}"
        )
        return False


def explain(error: ValidationError, schema: schemas.Node) -> list[str]:
    """One line for each problem that pydantic found in data of `schema`. Holds no value of a key that looks secret."""
    return [_line(detail, schema) for detail in error.errors(include_url=False)]


def _line(detail: ErrorDetails, schema: schemas.Node) -> str:
    path = detail["loc"]
    if path[-1:] == ("[key]",) and detail["type"] != "extra_forbidden":  # pydantic's mark for a bad key, not a key
        path = path[:-1]
    if path[:2] == ("attention", "engine_args"):
        path = path[:3]  # below, pydantic adds the names of the JSON types that it tried
    where = dotted(path) or "configuration"
    return f"{where}: {_message(detail, path, schema)}"


def _message(detail: ErrorDetails, path: Keys, schema: schemas.Node) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    node = schemas.node_at(schema, path) or {}
    value = "the value" if path and looks_like_secret(str(path[-1])) else show(detail["input"])
    allowed = _allowed(node, schema)
    match kind:
        case _ if kind == PROBLEM:
            return str(context["message"])
        case "extra_forbidden":
            return _unknown_key(path, schema)
        case "invalid_key":
            return "a key must be text"
        case "missing":
            return f"is missing; allowed: {allowed}"
        case "literal_error":
            return _not_a_choice(detail["input"], value, schemas.choices(schema, node))
        case "greater_than_equal":
            return f"{value} is below the minimum {context['ge']:g}"
        case "less_than_equal":
            return f"{value} is above the maximum {context['le']:g}"
        case "greater_than":
            return f"{value} is not above {context['gt']:g}"
        case "string_too_short":
            return f"is empty; allowed: {allowed}"
        case "model_type" if detail["input"] is None:
            return "is empty; write its keys below it, or leave the line out"
        case "model_type":
            return f"{value} is not a section; allowed: {allowed}"
        case "finite_number" | "invalid-json-value":
            return f"{value} can't be used; allowed: {allowed}"
        case _ if kind.endswith("_type") or kind == "int_from_float":
            return f"{value} is {kind_of(detail['input'])}; allowed: {allowed}"
        case _:
            return f"{value} can't be used ({detail['msg']}); allowed: {allowed}"


def _allowed(node: schemas.Node, schema: schemas.Node) -> str:
    keys = schemas.properties(schema, node)
    if keys:
        # The model is the one section that may also be given as text.
        return ("text or " if len(schemas.alternatives(schema, node)) > 1 else "") + "the keys " + ", ".join(keys)
    unit = schemas.unit_at(schema, node)
    return schemas.describe(schema, node) + (f" ({unit})" if unit else "")


def _unknown_key(path: Keys, schema: schemas.Node) -> str:
    key = str(path[-1])
    known = list(schemas.properties(schema, schemas.node_at(schema, path[:-1]) or {}))
    close = difflib.get_close_matches(key, known, n=1)
    elsewhere = [
        f"{section}.{key}" for section, node in schema["properties"].items() if key in schemas.properties(schema, node)
    ]
    suggestion = elsewhere or close
    hint = f"did you mean {suggestion[0]!r}? " if suggestion else ""
    return f"unknown key; {hint}allowed: {', '.join(known)}"


def _not_a_choice(given: object, value: str, words: list[str]) -> str:
    close = difflib.get_close_matches(given, words, n=1) if isinstance(given, str) else []
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if len(words) == 1:
        return f"{value} is not allowed; allowed: {words[0]}{hint}"
    return f"{value} is not one of {', '.join(words)}{hint}"


def show(value: object) -> str:
    """A user's value on one line: as in YAML, cut at 60 characters, without the credentials of a URL."""
    match value:
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case str():
            text = repr(_URL_CREDENTIALS.sub("://***@", value))
        case int() | float():
            text = repr(value)
        case _:
            return kind_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: object) -> str:
    names: dict[type[Any], str] = {str: "text", bool: "a boolean", int: "an integer", float: "a number"}
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return names.get(type(value), f"a {type(value).__name__}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
