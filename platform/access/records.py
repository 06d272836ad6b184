"""What is kept of each API key, and all of them as the JSON of a key file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertmesh.errors import ConfigError
from expertmesh.platform.access import tokens

INFER: Literal["infer"] = "infer"
"""The OpenAI API and what belongs to it."""
ADMIN: Literal["admin"] = "admin"
"""The routes below /mesh."""
Scope = Literal["infer", "admin"]

MAX_KEYS = 10_000

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
_Limit = Annotated[int, Field(ge=1, le=10**9)]

_UNKNOWN = tokens.digest("")
"""Compared with where there is no key of that id, so that this takes as long."""


class Key(BaseModel):
    """An API key without its secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    id: Annotated[str, Field(pattern=rf"^{tokens.ID_PATTERN}$")]
    name: _Name
    """Chosen by whoever made it; one of its kind in a file."""
    scopes: Annotated[list[Scope], Field(min_length=1)]
    tenant: _Name
    """Requests of different tenants share no cached KV block."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str
    """ISO 8601, UTC."""
    requests_per_minute: _Limit | None = None
    """None: any number. As many may come at once, after a pause."""
    concurrent_requests: _Limit | None = None
    """None: any number."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    keys: Annotated[list[Key], Field(max_length=MAX_KEYS)] = []


class KeyRing:
    """The keys of one file. Immutable; `with_key` and `without` make changed ones."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        """Raises ConfigError if two keys have one id or one name."""
        self._by_id: dict[str, Key] = {}
        names: set[str] = set()
        for key in keys:
            if key.id in self._by_id or key.name in names:
                raise ConfigError(f"API key {key.name!r} is there twice, by its name or its id")
            self._by_id[key.id] = key
            names.add(key.name)

    @classmethod
    def parse(cls, raw: bytes | str) -> Self:
        """Reads what `dump` writes. Raises ConfigError, which holds no digest, for anything else."""
        try:
            return cls(_File.model_validate_json(raw).keys)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{f'{where}: ' if where else ''}{first['msg']}") from None

    def dump(self) -> str:
        """The file's text."""
        return _File(keys=list(self)).model_dump_json(indent=2) + "\n"

    def find(self, token: str) -> Key | None:
        """The key that `token` is; None if it is none of these."""
        key = self._by_id.get(tokens.id_of(token) or "")
        right = tokens.matches(token, _UNKNOWN if key is None else key.sha256)
        return key if right else None

    def with_key(self, key: Key) -> KeyRing:
        """These and one more. Raises ConfigError if its name is taken or the file would hold too many."""
        if len(self._by_id) >= MAX_KEYS:
            raise ConfigError(f"a file holds at most {MAX_KEYS} API keys")
        return KeyRing([*self, key])

    def without(self, name_or_id: str) -> KeyRing:
        """These but one. Raises ConfigError if there is no key of that name or id."""
        rest = [key for key in self if name_or_id not in (key.name, key.id)]
        if len(rest) == len(self._by_id):
            raise ConfigError(f"no API key is called {name_or_id!r}; `expertmesh keys list` shows those that are there")
        return KeyRing(rest)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)
