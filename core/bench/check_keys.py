"""Dotted keys of a report's JSON, and limits on them with their units: pure parsing."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from infopt.core.errors import UsageError
from infopt.core.recipe.base import nearest

_TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_COUNTS = {"k": 1e3, "M": 1e6, "%": 1e-2}
_QUANTITY = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([^\s\d]*)")
_MORE_IS_BETTER = re.compile(
    r"(?:^|\.)(?:goodput|max_goodput|attainment|completed|requests_per_s"
    r"|(?:steady_|total_)?(?:output_)?tokens_per_s|prefix_hit_share)$"
)
_LESS_IS_BETTER = re.compile(
    r"(?:^|\.)(?:\w+_s(?:\.(?:p\d+|mean|min|max))?|failed|cost_per_million_output_tokens"
    r"|preemptions|waiting_\w+)$"
)


def numbers(report: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float | None]]:
    """Every dotted key of a number, with the number; None where it is infinite."""
    infinite = set(report.get("infinite") or ()) if before else set()
    for name, value in report.items():
        key = f"{before}{name}"
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield key, float(value)
        elif value is None and name in infinite:
            yield key, None
        elif isinstance(value, Mapping) and key not in ("made", "provenance", "model", "series"):
            yield from numbers(value, f"{key}.")
        elif isinstance(value, list):
            rows = {str(at): row for at, row in enumerate(value) if isinstance(row, Mapping)}
            yield from numbers(rows, f"{key}.")


def find(report: Mapping[str, Any], word: str, file: str) -> tuple[str, float]:
    """The key that a word means (`ttft.p95` is `ttft_s.p95`) and its number, maybe infinite.

    Raises UsageError, naming the nearest key.
    """
    known = dict(numbers(report))
    head, _, rest = word.partition(".")
    for key in (word, f"{head}_s.{rest}" if rest else f"{head}_s"):
        if key in known:
            value = known[key]
            return key, math.inf if value is None else value
    if _is_null(report, word) or _is_null(report, f"{head}_s.{rest}" if rest else f"{head}_s"):
        raise UsageError(
            f"{word} has no value in {file}", "the run did not measure it, or nothing completed"
        )
    short = {_short(key): key for key in known}
    hint = nearest(word, list(known) + [key for key in short if key not in known])
    if hint.startswith("known: "):
        hint = "known: " + ", ".join(sorted(key for key in known if "." not in key)[:12])
    raise UsageError(f"{file} has no number {word!r}", hint)


def _short(key: str) -> str:
    head, dot, rest = key.partition(".")
    return head.removesuffix("_s") + dot + rest


def _is_null(report: Mapping[str, Any], key: str) -> bool:
    """Whether the report has the key, or the beginning of its path, with nothing in it."""
    at: Any = report
    for part in key.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return False
        if at[part] is None:
            return True
        at = at[part]
    return False


def is_time(key: str) -> bool:
    """Whether a key's unit is the second."""
    return any(part.endswith("_s") and not part.endswith("per_s") for part in key.split("."))


def more_is_better(key: str) -> bool:
    """Which way a figure is to go; raises UsageError where that cannot be told."""
    if _MORE_IS_BETTER.search(key):
        return True
    if _LESS_IS_BETTER.search(key) and not key.endswith("per_s"):
        return False
    raise UsageError(
        f"whether more of {key} is better or worse cannot be told", "set --max or --min on it"
    )


def parse_limit(text: str, option: str) -> tuple[str, str]:
    """'ttft.p95=200ms' -> ('ttft.p95', '200ms'); raises UsageError."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise UsageError(f"{option} {text!r} is no limit", "such as ttft_s.p95=200ms")
    return key, value


def parse_quantity(text: str, key: str) -> float:
    """A number with or without its unit, in the unit of the key: seconds, or a count or share.

    Raises UsageError.
    """
    found = _QUANTITY.fullmatch(text)
    units = _TIMES if is_time(key) else _COUNTS
    if found is None or found[2] not in {"", *units}:
        allowed = "us, ms, s or min" if is_time(key) else "k, M or %"
        raise UsageError(f"{key}={text}: not a number with a unit that {key} has", f"{allowed}")
    value = float(found[1]) * units.get(found[2], 1.0)
    if not math.isfinite(value):
        raise UsageError(f"{key}={text}: not a finite number")
    return value


def parse_share(text: str, what: str) -> float:
    """'5%' or 0.05 -> 0.05; raises UsageError for what is no share of at least 0."""
    found = _QUANTITY.fullmatch(text.strip())
    if found is None or found[2] not in ("", "%"):
        raise UsageError(f"{what} {text!r} is no share", "such as 5%")
    value = float(found[1]) * (0.01 if found[2] else 1.0)
    if not 0 <= value < math.inf:
        raise UsageError(f"{what} {text!r} is not at least 0")
    if not found[2] and value >= 1:
        raise UsageError(f"{what} {text!r} is {value:.0%}", f"{value:g}% is written with its sign")
    return value
