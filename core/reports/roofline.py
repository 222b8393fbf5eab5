"""The figures of a profile's page: the roofline, and memory over time."""

import math
from collections.abc import Iterator

from infopt.core.reports.curves import curves
from infopt.core.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale
from infopt.core.reports.page import Figure, Key, Mark
from infopt.core.reports.profile import MeasuredPhase, MemoryTimeline, Peaks, ProfileReport
from infopt.core.reports.words import number, seconds

_ROOF_MARKS = 120
_PHASES = ("prefill", "decode")
_MB = 1e6


def roofline(report: ProfileReport) -> Figure:
    """Each phase and operator by its FLOPs a byte and its FLOP/s, under what the device reaches
    (Williams, Waterman and Patterson 2009)."""
    assert report.peaks is not None
    points = [
        (colour, name, *found)
        for colour, name in enumerate(_PHASES)
        for found in _points(getattr(report, name))
    ]
    across, up = _scales(report.peaks, [(x, y) for _, _, _, x, y, _ in points])
    marks = [*_roof(report.peaks, across, up)]
    marks += [
        Mark(
            across.place(x),
            up.place(y),
            "ring" if whole else "dot",
            colour,
            f"{name}: {what}, {number(x, '.3g')} FLOP a byte, {number(y / 1e9, '.4g')} GFLOP/s",
            label=name if whole else "",
        )
        for colour, name, what, x, y, whole in points
    ]
    peaks = report.peaks
    return Figure(
        title="Roofline",
        description="Each phase (ring) and its operators (dots) by FLOPs a byte moved and FLOP/s "
        f"reached, under the peaks measured here: {peaks.flops_per_s / 1e9:.0f} GFLOP/s and "
        f"{peaks.bytes_per_s / 1e9:.1f} GB/s in {peaks.dtype}. Both axes are logarithmic.",
        x_label="FLOP a byte",
        y_label="GFLOP/s",
        x_ticks=tuple((across.place(v), f"{v:g}") for v in _powers(across)),
        y_ticks=tuple((up.place(v), f"{v / 1e9:g}") for v in _powers(up)),
        marks=tuple(marks),
        legend=(
            *(Key("ring", n, name) for n, name in enumerate(_PHASES) if getattr(report, name)),
            Key("dash", -1, "what the device reaches"),
        ),
    )


def _points(phase: MeasuredPhase | None) -> Iterator[tuple[str, float, float, bool]]:
    """(name, FLOPs a byte, FLOP/s, whether it is the whole phase)."""
    if phase is None:
        return
    yield f"whole, {seconds(phase.seconds)}", phase.flops / phase.bytes, phase.flops_per_s, True
    for one in phase.operators:
        if one.flops > 0 and one.bytes > 0 and one.seconds > 0:
            yield one.name, one.flops / one.bytes, one.flops / one.seconds, False


def _scales(peaks: Peaks, points: list[tuple[float, float]]) -> tuple[Scale, Scale]:
    ridge = peaks.flops_per_s / peaks.bytes_per_s
    xs = [ridge, *(x for x, _ in points)]
    ys = [peaks.flops_per_s, *(y for _, y in points)]
    left, right = _decades(min(xs) / 2, max(xs) * 2)
    low, high = _decades(min(ys) / 2, max(ys) * 1.2)
    return (
        Scale(left, right, LEFT, WIDTH - RIGHT, log=True),
        Scale(low, high, HEIGHT - BOTTOM, TOP, log=True),
    )


def _decades(low: float, high: float) -> tuple[float, float]:
    return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))


def _powers(scale: Scale) -> list[float]:
    first, last = round(math.log10(scale.low)), round(math.log10(scale.high))
    return [10.0**power for power in range(first, last + 1)]


def _roof(peaks: Peaks, across: Scale, up: Scale) -> Iterator[Mark]:
    low, high = math.log10(across.low), math.log10(across.high)
    for step in range(_ROOF_MARKS + 1):
        x = 10.0 ** (low + (high - low) * step / _ROOF_MARKS)
        y = min(peaks.flops_per_s, x * peaks.bytes_per_s)
        if y >= up.low:
            told = f"at {number(x, '.3g')} FLOP a byte: {number(y / 1e9, '.4g')} GFLOP/s"
            yield Mark(across.place(x), up.place(y), "dash", -1, told)


def memory_figure(memory: MemoryTimeline) -> Figure:
    """Megabytes over milliseconds while the phases ran."""
    line = [(int(1000 * at), count / _MB) for at, count in memory.samples]
    expected = [(at, memory.expected_bytes / _MB) for at in (line[0][0], line[-1][0])]
    found = curves("Memory over time", "MB", {"measured": line, "expected": expected}, "ms")
    assert found is not None
    return found
