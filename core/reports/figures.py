"""The plots of a report's page: scales, marks and their titles; a template draws them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from infopt.core.reports.kernels import AttentionRow, KernelRow, Raced, RowOpRow
from infopt.core.reports.page import Figure, Key, Mark
from infopt.core.reports.quantize import LayerError, SensitivityRow
from infopt.core.reports.words import number, size

WIDTH = 960.0
HEIGHT = 360.0
LEFT = 70.0
RIGHT = 20.0
TOP = 16.0
BOTTOM = 44.0
"""The frame, which the template shares."""
COLOURS = 8
_TICKS = 14


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values between `low` and `high` onto a line from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        share = (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


def drawable(value: float | None) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return value is not None and math.isfinite(value) and value > 0


def layer_errors(layers: Sequence[LayerError]) -> Figure:
    """The error of every layer in its order, coloured by its kind, beside plain rounding's."""
    shown = [v for layer in layers for v in (layer.error, layer.rtn_error) if drawable(v)]
    vertical = _log_scale(shown)
    across = _across(len(layers))
    kinds = list(dict.fromkeys(_kind(layer.name) for layer in layers))
    marks: list[Mark] = []
    for index, layer in enumerate(layers):
        colour = kinds.index(_kind(layer.name)) % COLOURS
        title = (
            f"{layer.name}: error {number(layer.error, '.3g')}, "
            f"rounded to nearest {number(layer.rtn_error, '.3g')}, {layer.scheme or layer.bits}"
        )
        if layer.fallback:
            title += f"; {layer.fallback}"
        pairs = (("dash", layer.rtn_error), ("ring" if layer.fallback else "dot", layer.error))
        marks += [
            Mark(across.place(index), vertical.place(value), shape, colour, title)
            for shape, value in pairs
            if drawable(value)
        ]
    legend = [Key("dot", n % COLOURS, kind) for n, kind in enumerate(kinds)]
    legend.append(Key("dash", -1, "rounded to nearest"))
    if any(layer.fallback for layer in layers):
        legend.append(Key("ring", -1, "fell back"))
    missing = [layer.name for layer in layers if not drawable(layer.error)]
    return Figure(
        title="Error of each layer",
        description="Relative error of each quantized layer in the order of the model, on a "
        "logarithmic axis; a dash marks the error of rounding the same layer to nearest.",
        x_label="layers in order, by block",
        y_label="relative error",
        x_ticks=_block_ticks([layer.name for layer in layers], across),
        y_ticks=_log_ticks(vertical),
        marks=tuple(marks),
        legend=tuple(legend),
        note=_missing(missing),
    )


def sensitivity(rows: Sequence[SensitivityRow]) -> Figure:
    """KL of every unit in its order, one colour for each bit width."""
    units = list(dict.fromkeys(row.unit for row in rows))
    widths = sorted({row.bits for row in rows})
    vertical = _log_scale([row.kl for row in rows if drawable(row.kl)])
    across = _across(len(units))
    places = {unit: across.place(index) for index, unit in enumerate(units)}
    marks = tuple(
        Mark(
            places[row.unit],
            vertical.place(row.kl),
            "dot",
            widths.index(row.bits) % COLOURS,
            f"{row.unit} at {row.bits} bits: KL {number(row.kl, '.3g')} nats, "
            f"{number(row.delta_nll, '+.3g')} nats a token",
        )
        for row in rows
        if drawable(row.kl)
    )
    return Figure(
        title="Sensitivity of each unit",
        description="Divergence of the model's predictions when one unit alone is quantized, in "
        "the order of the model, on a logarithmic axis.",
        x_label="units in order, by block",
        y_label="KL, nats a token",
        x_ticks=_block_ticks(units, across),
        y_ticks=_log_ticks(vertical),
        marks=marks,
        legend=tuple(Key("dot", n % COLOURS, f"{w} bits") for n, w in enumerate(widths)),
        note=_missing([f"{row.unit} at {row.bits}" for row in rows if not drawable(row.kl)]),
    )


def size_quality(points: Sequence[tuple[str, int, float]]) -> Figure:
    """Artifacts by their bytes and what they lost: (name, bytes, change of the NLL)."""
    down = _linear_scale([loss for _, _, loss in points], HEIGHT - BOTTOM, TOP)
    across = _linear_scale([float(count) for _, count, _ in points], LEFT, WIDTH - RIGHT)
    return Figure(
        title="Size and quality",
        description="Each artifact by the bytes of its weights and by the nats a token that it "
        "lost against its baseline; lower left is better.",
        x_label="bytes of the weights",
        y_label="change of the NLL, nats a token",
        x_ticks=tuple((across.place(v), size(v)) for v in steps(across)),
        y_ticks=tuple((down.place(v), f"{v:+.3g}" if v else "0") for v in steps(down)),
        marks=tuple(
            Mark(
                across.place(float(count)),
                down.place(loss),
                "dot",
                index % COLOURS,
                f"{name}: {size(count)}, {loss:+.4f} nats a token",
                label=name,
            )
            for index, (name, count, loss) in enumerate(points)
        ),
        legend=(),
    )


def kernel_shares(rows: Sequence[Raced]) -> Figure:
    """Of each op the share of the limit that it is nearer to, beside the best of torch's ways."""
    shown = [share for row in rows for share in _shares(row) if share is not None]
    vertical = _linear_scale([1.0, *shown], HEIGHT - BOTTOM, TOP)
    across = _across(len(rows))
    names = list(dict.fromkeys(_op(row) for row in rows))
    marks: list[Mark] = []
    for index, row in enumerate(rows):
        ours, torchs = _shares(row)
        title = f"{_op(row)} {_shape(row)}: {ours:.0%} of the limit"
        if torchs is not None:
            title += f"; {row.torch_kernel}: {torchs:.0%}"
            marks.append(Mark(across.place(index), vertical.place(torchs), "dash", 0, title))
        shape = "dot" if row.right else "ring"
        colour = names.index(_op(row)) % COLOURS
        marks.append(Mark(across.place(index), vertical.place(ours), shape, colour, title))
    return Figure(
        title="Share of the limit",
        description="Each op by the larger of its shares of the best reading of memory and of the "
        "best matrix product, both measured; a dash marks the best of torch's ways, a ring a "
        "result that is wrong.",
        x_label="ops in the order of the tables",
        y_label="share of the limit",
        x_ticks=(),
        y_ticks=tuple((vertical.place(v), f"{v:.0%}") for v in steps(vertical)),
        marks=tuple(marks),
        legend=(
            *(Key("dot", n % COLOURS, name) for n, name in enumerate(names)),
            Key("dash", -1, "the best of torch's"),
        ),
    )


def _shares(row: Raced) -> tuple[float, float | None]:
    ours = row.of_bandwidth
    if isinstance(row, KernelRow | AttentionRow):
        ours = max(ours, row.of_product)
    return ours, None if row.ratio is None else ours / row.ratio


def _op(row: Raced) -> str:
    match row:
        case KernelRow():
            return row.format
        case AttentionRow():
            return f"attention, {row.op}"
        case RowOpRow():
            return row.op
    raise AssertionError("no other rows are raced")


def _shape(row: Raced) -> str:
    match row:
        case KernelRow():
            return f"{row.m} x {row.n} x {row.k}"
        case AttentionRow():
            return f"{row.queries} of {row.context}"
        case RowOpRow():
            return f"{row.rows} x {row.columns}"
    raise AssertionError("no other rows are raced")


def _across(count: int) -> Scale:
    return Scale(-0.5, max(count, 1) - 0.5, LEFT, WIDTH - RIGHT)


def _log_scale(values: Sequence[float]) -> Scale:
    """Between round values (1, 2 or 5 times a power of ten) around the least and the greatest."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    round_values = _round_values(low, high)
    bottom = max((v for v in round_values if v <= low), default=low)
    top = min((v for v in round_values if v >= high), default=high)
    return Scale(bottom, top if top > bottom else bottom * 10, HEIGHT - BOTTOM, TOP, log=True)


def _round_values(low: float, high: float) -> list[float]:
    # The ends of the floats: their own powers of ten would be 0 and infinite.
    first = max(math.floor(math.log10(low)) - 1, -323)
    last = min(math.ceil(math.log10(high)) + 1, 308)
    found = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in (1, 2, 5)]
    return [value for value in found if math.isfinite(value)]


def _log_ticks(scale: Scale) -> tuple[tuple[float, str], ...]:
    """Powers of ten, thinned out; over few of them the values between as well."""
    within = [v for v in _round_values(scale.low, scale.high) if scale.low <= v <= scale.high]
    powers = [v for v in within if f"{v:e}".startswith("1.0")]
    shown = within if len(within) <= 8 else powers[:: max(1, -(-len(powers) // 8))]
    return tuple((scale.place(v), f"{v:.0e}" if v < 1e-3 or v > 1e6 else f"{v:g}") for v in shown)


def _linear_scale(values: Sequence[float], start: float, end: float) -> Scale:
    low, high = min(0.0, *values), max(values)
    spare = 0.08 * (high - low) or 1.0
    return Scale(low - (spare if low < 0 else 0.0), high + spare, start, end)


def steps(scale: Scale) -> list[float]:
    """Round values, about six, within the scale."""
    span = scale.high - scale.low
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1.0, 2.0, 5.0, 10.0) if power * f >= rough)
    first = math.ceil(scale.low / step)
    return [n * step for n in range(first, math.floor(scale.high / step) + 1)]


def _block_ticks(names: Sequence[str], across: Scale) -> tuple[tuple[float, str], ...]:
    """Where each block begins, thinned out to what can be read."""
    begins: dict[str, int] = {}
    for index, name in enumerate(names):
        found = re.search(r"\.(\d+)\.", name)
        if found:
            begins.setdefault(found[1], index)
    stride = max(1, -(-len(begins) // _TICKS))
    return tuple((across.place(at), block) for block, at in list(begins.items())[::stride])


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _missing(names: Sequence[str]) -> str:
    if not names:
        return ""
    some = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return f"Not drawn, being zero or not finite: {len(names)} ({some})."
