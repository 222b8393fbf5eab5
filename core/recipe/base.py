"""The base of all settings, and how a mistake in them is told."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from infopt.core.errors import RecipeError


class Settings(BaseModel):
    """Frozen settings of one step: every key is known, every value has its type already.

    So `yes` in quotes is no boolean, and 4.5 no whole number; whole numbers are floats too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Words = Annotated[tuple[str, ...], Strict(False)]
"""YAML's lists are tuples here."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]

S = TypeVar("S", bound=Settings)


def validated(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Build settings from plain values; `where` names their source: a file and step, or the like.

    Raises RecipeError with the first fault; an unknown key is answered with the nearest right one.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise RecipeError(*_explain(kind, error.errors()[0], where)) from None


def nearest(word: str, known: list[str]) -> str:
    """A hint: the nearest of the known words, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _explain(kind: type[Settings], fault: ErrorDetails, where: str) -> tuple[str, str | None]:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        owner = _owner(kind, fault["loc"][:-1])
        word = str(fault["loc"][-1])
        return f"unknown key {word!r} in {where}", nearest(word, list(owner.model_fields))
    reason = fault["msg"].removeprefix("Value error, ")
    value = f" (got {fault['input']!r})" if fault["type"] != "missing" and key else ""
    return (f"{key}: {reason}{value} in {where}" if key else f"{reason} in {where}"), None


def _owner(kind: type[Settings], path: tuple[int | str, ...]) -> type[Settings]:
    """The settings class that a path of keys leads to."""
    for part in path:
        field = kind.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return kind
        if issubclass(field.annotation, Settings):
            kind = field.annotation
    return kind
