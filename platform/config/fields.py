"""What the sections are made of: the strict base, number types that carry their unit, and paths.

A unit is kept in the field's JSON schema under the key `unit`, so that the schema and the documentation read it from
the one place where the field is declared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

PROBLEM = "expertmesh_problem"
"""Error type whose message is already written for the user."""


class Section(BaseModel):
    """Base of every part of the configuration: frozen, no unknown keys, no conversion between types.

    Integers are taken where a number is wanted. Defaults are validated too, so that a check across two fields also sees
    the one that the user left out.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        hide_input_in_errors=True,
    )


@dataclass(frozen=True)
class Loading:
    """Validation context of a configuration that is read on the machine where it will run.

    With it, relative paths are made absolute against `base` and a checkpoint folder must exist. Without it (a model
    built in Python) the file system is not touched.
    """

    base: Path

    def absolute(self, path: str | Path) -> Path:
        return Path(os.path.normpath(self.base / Path(path).expanduser()))


def loading(info: ValidationInfo) -> Loading | None:
    return info.context if isinstance(info.context, Loading) else None


def problem(message: str) -> PydanticCustomError:
    """An error for a validator to raise; `message` reaches the user after the field's dotted path."""
    return PydanticCustomError(PROBLEM, "{message}", {"message": message})


def unit(name: str) -> dict[str, Any]:
    return {"unit": name}


def _absolute(path: Path, info: ValidationInfo) -> Path:
    where = loading(info)
    if where is None:
        return path
    try:
        return where.absolute(path)
    except RuntimeError as error:  # `~name` of a user that this machine doesn't know
        raise problem(f"{str(path)!r} can't be expanded: {error}") from None


Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1, json_schema_extra=unit("tokens"))]
Rows = Annotated[int, Field(ge=1, json_schema_extra=unit("rows"))]
Kibibytes = Annotated[int, Field(ge=1, json_schema_extra=unit("KiB"))]
Mebibytes = Annotated[int, Field(ge=1, json_schema_extra=unit("MiB"))]
Gibibytes = Annotated[float, Field(gt=0, json_schema_extra=unit("GiB"))]
Seconds = Annotated[float, Field(gt=0, json_schema_extra=unit("s"))]
Milliseconds = Annotated[float, Field(gt=0, json_schema_extra=unit("ms"))]
Quantity = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]
