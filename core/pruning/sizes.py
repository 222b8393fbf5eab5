"""How large a shape is, and the shape that a budget leaves; pure arithmetic.

The rule for a budget: narrow the feed-forward networks to no less than 3/4, then leave out blocks
down to 2/3 of them; then 1/2 and 1/3; then 1/4 and one block. As many blocks stay as the width at
the end of a rung allows, then as many channels (in steps of 32) as still fit.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from infopt.core.errors import UsageError

_RUNGS = ((3 / 4, 1.0), (3 / 4, 2 / 3), (1 / 2, 2 / 3), (1 / 2, 1 / 3), (1 / 4, 1 / 3), (1 / 4, 0))
"""Least share of the channels and of the blocks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks, and in each of them KV groups and channels; and the hidden width."""

    layers: int
    groups: int
    ffn: int
    hidden: int


Power = tuple[int, int, int]
"""Exponents of groups, ffn and hidden."""
PARTS = ("heads", "ffn", "hidden")


@dataclass(frozen=True, slots=True)
class Cost:
    """A polynomial in a shape's sizes: what a block costs on average, and what lies around."""

    block: Mapping[Power, float]
    ends: Mapping[Power, float]

    def of(self, shape: Shape) -> float:
        """Of the whole model."""
        return shape.layers * _value(self.block, shape) + _value(self.ends, shape)

    def scaled(self, factor: float) -> "Cost":
        """The same in another unit."""
        block, ends = (
            {power: weight * factor for power, weight in terms.items()}
            for terms in (self.block, self.ends)
        )
        return Cost(block, ends)


def _value(terms: Mapping[Power, float], shape: Shape) -> float:
    return sum(
        weight * float(shape.groups**a * shape.ffn**b * shape.hidden**c)
        for (a, b, c), weight in terms.items()
    )


def terms(
    tensors: Iterable[tuple[Sequence[int], Mapping[int, str]]], whole: Shape
) -> Counter[Power]:
    """The sizes of tensors as a polynomial: of each its shape, and which axis is of which part.

    An axis of a part is its number of units times a constant.
    """
    units = dict(zip(PARTS, (whole.groups, whole.ffn, whole.hidden), strict=True))
    found: Counter[Power] = Counter()
    for shape, axes in tensors:
        size = math.prod(n // units[axes[i]] if i in axes else n for i, n in enumerate(shape))
        parts = Counter(axes.values())
        found[parts["heads"], parts["ffn"], parts["hidden"]] += size
    return found


def width_step(whole: int) -> int:
    """Widths that are chosen are multiples of this: 32, less in tiny models."""
    return 32 if whole >= 128 else max(1, whole // 8)


def rounded(width: float, whole: int, step: int) -> int:
    """The nearest multiple of `step`, at least one and at most the whole."""
    return min(whole, max(step, round(width / step) * step))


def solve(cost: Cost, whole: Shape, budget: float, *, narrow: bool, what: str) -> Shape:
    """The shape of the rule above that costs at most `budget`.

    `narrow`: whether channels can be cut at all. `what` names the budget in the error: UsageError
    with the reachable range.
    """
    step = width_step(whole.ffn)
    if budget < cost.of(whole):
        for channels, blocks in _RUNGS if narrow else ((1.0, 0.0),):
            # Up to whole steps, so that no less than the share stays.
            ffn = min(whole.ffn, math.ceil(round(channels * whole.ffn / step, 6)) * step)
            layers = max(1, math.ceil(round(blocks * whole.layers, 6)))
            least = replace(whole, layers=layers, ffn=ffn if narrow else whole.ffn)
            if cost.of(least) <= budget:
                return _filled(cost, whole, least, budget, step if narrow else None)
    raise UsageError(
        f"{what} is not reachable: cutting channels and blocks reaches from "
        f"{_number(_least(cost, whole, narrow))} to less than {_number(cost.of(whole))}",
        "layers, ffn, heads and hidden say any other shape",
    )


def _least(cost: Cost, whole: Shape, narrow: bool) -> float:
    step = width_step(whole.ffn)
    ffn = min(whole.ffn, math.ceil(round(_RUNGS[-1][0] * whole.ffn / step, 6)) * step)
    return cost.of(replace(whole, layers=1, ffn=ffn if narrow else whole.ffn))


def _filled(cost: Cost, whole: Shape, least: Shape, budget: float, step: int | None) -> Shape:
    """As many blocks as fit, then as many channels."""
    shape = least
    while shape.layers < whole.layers:
        more = replace(shape, layers=shape.layers + 1)
        if cost.of(more) > budget:
            break
        shape = more
    while step is not None and shape.ffn < whole.ffn:
        more = replace(shape, ffn=min(whole.ffn, shape.ffn + step))
        if cost.of(more) > budget:
            break
        shape = more
    return shape


def between(whole: Shape, target: Shape, rounds: int) -> list[Shape]:
    """The shapes after each of several rounds, each cutting about the same share of the rest."""

    def at(old: int, new: int, index: int, step: int) -> int:
        if index == rounds or old == new:
            return new
        value: float = old * math.pow(new / old, index / rounds)
        return min(old, max(new, round(value / step) * step))

    found: list[Shape] = []
    for index in range(1, rounds + 1):
        shape = Shape(
            at(whole.layers, target.layers, index, 1),
            at(whole.groups, target.groups, index, 1),
            at(whole.ffn, target.ffn, index, width_step(whole.ffn)),
            # Widths between may be such as the config cannot say: cut in the last round only.
            target.hidden if index == rounds else whole.hidden,
        )
        if shape != (found[-1] if found else whole):
            found.append(shape)
    return found


def _number(value: float) -> str:
    """'134.5M', or a share where it is small."""
    return f"{value / 1e6:.1f}M" if value >= 1e5 else f"{value:.5g}"
