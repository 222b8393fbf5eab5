"""Curves over the steps of a training, for a report's page."""

from collections.abc import Mapping, Sequence

from infopt.core.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale
from infopt.core.reports.page import Figure, Key, Mark
from infopt.core.reports.words import number

Point = tuple[int, float]
_SHOWN = 300
"""Steps of a curve that are drawn, at most."""
_TICKS = 6


def curves(
    title: str, y_label: str, lines: Mapping[str, Sequence[Point]], x_label: str = "step"
) -> Figure | None:
    """Each line's points (step, value) as marks of its colour; None where there are none."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    last = max(1, *steps)
    low, high = min(values), max(values)
    across = Scale(0.0, float(last), LEFT, WIDTH - RIGHT)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    up = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
    marks = [
        Mark(
            across.place(step),
            up.place(value),
            "dot",
            colour,
            f"{name}, {x_label} {step}: {number(value)}",
        )
        for colour, (name, line) in enumerate(lines.items())
        for step, value in _thinned(line)
    ]
    return Figure(
        title=title,
        description=f"{title}: " + "; ".join(_told(name, line) for name, line in lines.items()),
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(
            (across.place(at), f"{at:.0f}") for at in _even(0.0, float(last), integers=True)
        ),
        y_ticks=tuple((up.place(at), number(at, ".3g")) for at in _even(low, high)),
        marks=tuple(marks),
        legend=tuple(Key("dot", colour, name) for colour, name in enumerate(lines)),
    )


def _thinned(line: Sequence[Point]) -> list[Point]:
    """Every n-th point, and the last."""
    step = max(1, -(-len(line) // _SHOWN))
    kept = list(line[::step])
    return kept if not line or kept[-1] == line[-1] else [*kept, line[-1]]


def _told(name: str, line: Sequence[Point]) -> str:
    if not line:
        return f"{name} was not measured"
    return f"{name} from {number(line[0][1])} to {number(line[-1][1])}"


def _even(low: float, high: float, *, integers: bool = False) -> list[float]:
    """A few values from low to high."""
    if low == high:
        return [low]
    found = [low + (high - low) * part / (_TICKS - 1) for part in range(_TICKS)]
    return sorted({float(round(at)) for at in found}) if integers else found
