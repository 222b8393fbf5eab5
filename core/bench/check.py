"""The door: the figures of one run against limits, or against a stored run."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from infopt.core.bench.check_keys import (
    find,
    more_is_better,
    numbers,
    parse_limit,
    parse_quantity,
    parse_share,
)
from infopt.core.bench.compare_inputs import Run, read_report, unlike
from infopt.core.errors import GateError, UsageError
from infopt.core.reports.check import CheckedLimit, CheckReport

DEFAULT_KEYS = (
    "ttft_s.p50",
    "ttft_s.p95",
    "tpot_s.p50",
    "tpot_s.p95",
    "e2e_s.p50",
    "e2e_s.p95",
    "output_tokens_per_s",
    "goodput",
)
"""What `--max-regression 5%`, without a key, is about: those of them that both runs have."""
# Below so many samples not even the greatest bounds the percentile with 95% (share^n > 5%).
_LEAST = {
    f"p{share}": math.ceil(math.log(0.05) / math.log(share / 100)) for share in (50, 90, 95, 99)
}


def check(
    file: Path,
    *,
    most: Sequence[str] = (),
    least: Sequence[str] = (),
    baseline: Path | None = None,
    max_regression: Sequence[str] = (),
    min_samples: int | None = None,
) -> CheckReport:
    """Hold a bench's figures against limits such as `ttft_s.p95=200ms`.

    `max_regression` holds shares (`5%`) or `KEY=5%` of the baseline's figures. Raises UsageError
    for an invalid run, too few samples, an unknown key or a file that is no bench's.
    """
    if not (most or least or max_regression):
        raise UsageError("there is nothing to check", "set --max, --min or --max-regression")
    if (baseline is None) == bool(max_regression):
        missing = "--baseline" if max_regression else "--max-regression"
        raise UsageError(
            f"{missing} is missing", "--baseline FILE and --max-regression go together"
        )
    report = _sound(file)
    found = [_limit(report, file, text, "max", min_samples) for text in most]
    found += [_limit(report, file, text, "min", min_samples) for text in least]
    if baseline is not None:
        found += _regressions(report, file, baseline, max_regression, min_samples)
    return CheckReport(
        provenance={"limits": "computed"},
        file=str(file),
        baseline=None if baseline is None else str(baseline),
        limits=tuple(found),
        passed=all(limit.holds for limit in found),
    )


def check_passed(report: CheckReport) -> None:
    """Raise GateError where a limit is missed."""
    missed = [limit for limit in report.limits if not limit.holds]
    if missed:
        more = f", and {len(missed) - 1} more" if len(missed) > 1 else ""
        first = missed[0]
        sign = ">" if first.kind == "max" else "<"
        value = "infinite" if first.value is None else f"{first.value:.6g}"
        raise GateError(
            f"{len(missed)} of {len(report.limits)} limits missed: "
            f"{first.key} {value} {sign} {first.limit:.6g}{more}"
        )


def _sound(file: Path) -> dict[str, Any]:
    report = read_report(file)
    if report.get("valid") is False:
        reasons = "; ".join(report.get("invalid_reasons") or ()) or "no reason told"
        raise UsageError(f"{file} is no valid run: {reasons}", "measure again")
    return report


def _limit(
    report: Mapping[str, Any],
    file: Path,
    text: str,
    kind: Literal["max", "min"],
    min_samples: int | None,
) -> CheckedLimit:
    word, value = parse_limit(text, f"--{kind}")
    key, measured = find(report, word, str(file))
    _enough(report, key, file, min_samples)
    return _judged(key, measured, kind, parse_quantity(value, key))


def _judged(
    key: str,
    measured: float,
    kind: Literal["max", "min"],
    limit: float,
    baseline: float | None = None,
) -> CheckedLimit:
    left = limit - measured if kind == "max" else measured - limit
    return CheckedLimit(
        key=key,
        value=measured if math.isfinite(measured) else None,
        kind=kind,
        limit=limit,
        margin=left / abs(limit) if limit and math.isfinite(left) else None,
        holds=left >= 0,
        baseline=baseline,
    )


def _enough(report: Mapping[str, Any], key: str, file: Path, min_samples: int | None) -> None:
    """Raise UsageError where a figure rests on too few requests."""
    place, _, percentile = key.rpartition(".")
    parts = key.split(".")
    level = report["levels"][int(parts[1])] if parts[0] == "levels" else report
    count = int(level.get("completed") or 0)
    if "with_failures" in place:
        count += int(level.get("failed") or 0)
    needed = _LEAST.get(percentile, 1) if min_samples is None else min_samples
    if count < needed:
        raise UsageError(
            f"{file}: {key} rests on {count} requests, and {needed} are wanted",
            "bench more --requests, or set --min-samples",
        )


def _regressions(
    report: Mapping[str, Any],
    file: Path,
    baseline: Path,
    max_regression: Sequence[str],
    min_samples: int | None,
) -> list[CheckedLimit]:
    stored = _sound(baseline)
    name = f"{file} and {baseline}"
    for line in unlike(name, Run(file, report, ()), Run(baseline, stored, ())):
        raise UsageError(line, "compare runs of one load")
    shares: dict[str, float] = {}
    for text in max_regression:
        if "=" in text:
            word, share = parse_limit(text, "--max-regression")
            shares[find(report, word, str(file))[0]] = parse_share(share, "--max-regression")
    for text in max_regression:
        if "=" not in text:
            share_of_all = parse_share(text, "--max-regression")
            both = set(dict(numbers(report))) & set(dict(numbers(stored)))
            shares = {k: share_of_all for k in DEFAULT_KEYS if k in both} | shares
    found = []
    for key, share_of_one in shares.items():
        better = more_is_better(key)
        _, measured = find(report, key, str(file))
        _, before = find(stored, key, str(baseline))
        for each, at in ((report, file), (stored, baseline)):
            _enough(each, key, at, min_samples)
        if not math.isfinite(before):
            raise UsageError(f"{baseline}: {key} is infinite", "take a sound run as the baseline")
        limit = before * (1 - share_of_one if better else 1 + share_of_one)
        found.append(_judged(key, measured, "min" if better else "max", limit, before))
    return found
