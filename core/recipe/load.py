"""The parts of a load's settings that have a form of their own: lengths, levels."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

Range = tuple[int, int]
"""Lowest and highest, both possible."""
LevelKey = Literal["concurrency", "request-rate"]
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def parse_tokens(value: int | str) -> Range:
    """128 -> (128, 128); '64-256' -> (64, 256); raises ValueError for anything else."""
    found = None if isinstance(value, bool) else _RANGE.fullmatch(str(value))
    if not isinstance(value, int | str) or found is None:
        raise ValueError("a whole number of tokens, or a range such as 64-256")
    low = int(found[1])
    high = int(found[2]) if found[2] else low
    if low < 1 or high < low:
        raise ValueError("a range goes from 1 or more up to no less than its start")
    return low, high


def _tokens(value: Any) -> int | str:
    low, high = parse_tokens(value)
    return low if low == high else f"{low}-{high}"


Tokens = Annotated[int | str, BeforeValidator(_tokens)]
"""A length, or a range of lengths, each as likely as any other."""


def parse_sweep(text: str) -> tuple[LevelKey, tuple[float, ...]]:
    """'concurrency=1,2,4' -> ('concurrency', (1, 2, 4)); raises ValueError for anything else."""
    key, equals, rest = text.partition("=")
    key = key.strip().replace("_", "-")
    if not equals or key not in ("concurrency", "request-rate"):
        raise ValueError("a sweep is concurrency=1,2,4 or request-rate=1,2,4")
    values: list[float] = []
    for word in rest.split(","):
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"{word.strip()!r} is no level of a sweep over {key}") from None
        whole = key != "concurrency" or value == int(value) if math.isfinite(value) else False
        if not whole or value <= 0:
            raise ValueError(f"{word.strip()!r} is no level of a sweep over {key}")
        if value in values:
            raise ValueError(f"the level {word.strip()} is there twice")
        values.append(value)
    return ("concurrency" if key == "concurrency" else "request-rate"), tuple(values)
