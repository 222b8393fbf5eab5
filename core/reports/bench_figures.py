"""The plots of a bench's page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from infopt.core.reports.bench_series import Distribution, Timeline
from infopt.core.reports.figures import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    steps,
)
from infopt.core.reports.page import Figure, Key, Line, Mark
from infopt.core.reports.words import number, seconds

_MARKED = {0.50: "p50", 0.95: "p95", 0.99: "p99"}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "End-to-end latency"}


def distribution(
    name: str,
    curves: Sequence[Distribution],
    labels: Mapping[int, str],
    percentiles: Mapping[int, Mapping[str, float]],
    limit: float | None,
) -> Figure:
    """The share of requests within each latency; one line a level, its percentiles as rings.

    `percentiles` (p50, p95, p99 by level) are those of the report, not of the line.
    """
    marked = [value for each in percentiles.values() for value in map(each.get, _MARKED.values())]
    drawn = [value for curve in curves for value in curve.values]
    top = max(*drawn, limit or 0.0, *(value for value in marked if value is not None))
    across = Scale(0.0, 1.05 * top or 1.0, LEFT, WIDTH - RIGHT)
    up = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    lines, marks = [], []
    for order, curve in enumerate(curves):
        colour = order % COLOURS
        lines.append(_cumulative(curve, labels[curve.level], across, up, colour))
        for share, percentile in _MARKED.items():
            value = percentiles.get(curve.level, {}).get(percentile)
            if value is not None and math.isfinite(value):
                told = f"{labels[curve.level]}: {percentile} {seconds(value)}"
                label = f"{percentile} {seconds(value)}" if len(curves) == 1 else ""
                marks.append(
                    Mark(across.place(value), up.place(share), "ring", colour, told, label)
                )
    legend = [Key("line", n % COLOURS, labels[c.level]) for n, c in enumerate(curves)]
    if limit is not None:
        at = across.place(limit)
        lines.append(Line(((at, HEIGHT - BOTTOM), (at, TOP)), -1, f"SLO {seconds(limit)}", True))
        legend.append(Key("dashes", -1, f"SLO: {seconds(limit)}"))
    title = _NAMES.get(name, name)
    return Figure(
        title=title,
        description=f"{title}: the share of completed requests within each time; rings mark p50, "
        "p95 and p99.",
        x_label=f"{title}, seconds" if top >= 1 else f"{title}, milliseconds",
        y_label="share of requests",
        x_ticks=_time_ticks(across, top),
        y_ticks=tuple((up.place(share), f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)),
        marks=tuple(marks),
        legend=tuple(legend),
        lines=tuple(lines),
    )


def _cumulative(curve: Distribution, label: str, across: Scale, up: Scale, colour: int) -> Line:
    last = max(1, len(curve.values) - 1)
    points = [(across.place(value), up.place(at / last)) for at, value in enumerate(curve.values)]
    # One value alone is a step from none to all.
    points = [(points[0][0], up.place(0.0)), *points]
    if len(curve.values) == 1:
        points[-1] = (points[-1][0], up.place(1.0))
    return Line(tuple(points), colour, label)


def latency_throughput(
    levels: Sequence[Mapping[str, Any]], labels: Mapping[int, str]
) -> Figure | None:
    """Output tokens a second against TTFT and TPOT at p95, level by level; None without two."""
    drawn = [
        (level, kind, float(level[key]["p95"]), float(level["output_tokens_per_s"]))
        for kind, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"))
        for level in levels
        if (level.get(key) or {}).get("p95") and level.get("output_tokens_per_s")
    ]
    if len({level["level"] for level, *_ in drawn}) < 2:
        return None
    across = Scale(0.0, 1.1 * max(rate for *_, rate in drawn), LEFT, WIDTH - RIGHT)
    low, high = (pick(value for _, _, value, _ in drawn) for pick in (min, max))
    up = Scale(low / 1.5, high * 1.5, HEIGHT - BOTTOM, TOP, log=True)
    lines, marks = [], []
    for colour, kind in enumerate(("TTFT", "TPOT")):
        points = sorted(
            (level["level"], rate, value) for level, one, value, rate in drawn if one == kind
        )
        at = [(across.place(rate), up.place(value)) for _, rate, value in points]
        if at:
            lines.append(Line(tuple(at), colour, f"{kind} at p95"))
        marks += [
            Mark(
                x,
                y,
                "dot",
                colour,
                f"{labels[level]}: {number(rate)} tokens/s, {kind} p95 {seconds(value)}",
                labels[level] if kind == "TTFT" else "",
            )
            for (x, y), (level, rate, value) in zip(at, points, strict=True)
        ]
    return Figure(
        title="Latency and throughput",
        description="Each level of the load by the output tokens a second that it reached and by "
        "its latency at p95, on a logarithmic axis; lower right is better.",
        x_label="output tokens a second",
        y_label="seconds at p95",
        x_ticks=tuple((across.place(v), number(v)) for v in steps(across)),
        y_ticks=_decades(up),
        marks=tuple(marks),
        legend=(Key("line", 0, "TTFT at p95"), Key("line", 1, "TPOT at p95")),
        lines=tuple(lines),
    )


def timeline(of: Timeline) -> tuple[Figure, Figure]:
    """Requests in flight, and output tokens a second, over the run."""
    flying = _over_time(
        of,
        of.in_flight,
        "Requests in flight",
        "Requests sent and not ended, in the mean over slices of the run; rings mark failures.",
        "requests",
        [at for at, count in enumerate(of.failed) if count],
    )
    flowing = _over_time(
        of,
        of.output_tokens_per_s,
        "Output tokens a second",
        "Tokens as they arrived, over slices of the run.",
        "tokens/s",
        [],
    )
    return flying, flowing


def _over_time(
    of: Timeline, values: Sequence[float], title: str, told: str, unit: str, rings: Sequence[int]
) -> Figure:
    end = of.start_s + of.slice_s * len(values)
    across = Scale(of.start_s, end, LEFT, WIDTH - RIGHT)
    up = Scale(0.0, 1.1 * max(values) or 1.0, HEIGHT - BOTTOM, TOP)
    middles = [of.start_s + (at + 0.5) * of.slice_s for at in range(len(values))]
    points = tuple(
        (across.place(time), up.place(value)) for time, value in zip(middles, values, strict=True)
    )
    marks = tuple(
        Mark(*points[at], "ring", 1, f"{of.failed[at]} failed at {middles[at]:.3g} s")
        for at in rings
    )
    return Figure(
        title=title,
        description=f"{title}: {told[0].lower()}{told[1:]}",
        x_label="seconds from the start",
        y_label=unit,
        x_ticks=tuple((across.place(v), number(v)) for v in steps(across)),
        y_ticks=tuple((up.place(v), number(v)) for v in steps(up)),
        marks=marks,
        legend=(Key("ring", 1, "failed"),) if marks else (),
        lines=(Line(points, 0, title),),
    )


def _time_ticks(across: Scale, top: float) -> tuple[tuple[float, str], ...]:
    scale = 1.0 if top >= 1 else 1e3
    return tuple((across.place(v), number(v * scale)) for v in steps(across))


def _decades(up: Scale) -> tuple[tuple[float, str], ...]:
    powers = range(math.floor(math.log10(up.low)), math.ceil(math.log10(up.high)) + 1)
    values = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return tuple((up.place(v), seconds(v)) for v in values if up.low <= v <= up.high)
