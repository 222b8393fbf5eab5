"""Which unit gets how many bits: the least KL for a mean width, or the least width for a KL.

A unit's KL is taken to add to those of the others (AutoQuantize and AutoScheme assume the same).
Spending bits one by one where the most KL is saved for each comes near the best sum; with a few
hundred units the best itself is as cheap, by dynamic programming over the bits spent. Where more
bits measured no better (chance, at widths that cost next to nothing) they are not spent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infopt.core.errors import UsageError
from infopt.core.reports.quantize import SensitivityRow

_STATES = 1 << 18
"""Amounts of spent bits that are told apart; real models' sizes are multiples of so much that
they need fewer, and then the result is exact."""


@dataclass(frozen=True, slots=True)
class _Unit:
    name: str
    parameters: int
    widths: tuple[tuple[int, float], ...]
    """Bits and KL, by bits."""


@dataclass(frozen=True, slots=True)
class _Frontier:
    """The least KL for every amount spent above the least widths, and how it is reached."""

    units: tuple[_Unit, ...]
    costs: tuple[tuple[int, ...], ...]
    """By unit and width, in quanta."""
    quantum: int
    """Bits that one step of the table stands for."""
    least: NDArray[np.float64]
    """By quanta that may be spent; never rises."""
    choices: tuple[NDArray[np.int8], ...]
    """By unit: the width taken where so much may be spent on it and those before it."""

    def bits_at(self, spent: int) -> dict[str, int]:
        """The widths that reach `least[spent]`, by unit."""
        found: dict[str, int] = {}
        pairs = list(zip(self.units, self.costs, self.choices, strict=True))
        for unit, costs, choices in reversed(pairs):
            choice = int(choices[spent])
            found[unit.name] = unit.widths[choice][0]
            spent -= costs[choice]
        return dict(reversed(found.items()))


def allocate(rows: Sequence[SensitivityRow], target_bits: float) -> dict[str, int]:
    """The widths of least predicted KL whose mean is at most `target_bits`, by unit.

    Of equal ones the narrowest; more `target_bits` never predict a larger KL. Raises UsageError
    for a target beyond the widths that were measured.
    """
    units = _units(rows)
    total = sum(unit.parameters for unit in units)
    floor = sum(unit.parameters * unit.widths[0][0] for unit in units)
    top = sum(unit.parameters * unit.widths[-1][0] for unit in units)
    # What float arithmetic may take from a target like 3.3 is given back.
    spending = target_bits * total * (1 + 1e-12)
    if not floor <= spending < top + 1:
        raise UsageError(
            f"target_bits {target_bits:g} is beyond the widths that were measured: "
            f"{floor / total:.4g} to {top / total:.4g} bits",
            "choose a target between them, or other mixed_bits",
        )
    frontier = _frontier(units)
    spendable = len(frontier.least) - 1
    if spending < top:
        spendable = min((math.floor(spending) - floor) // frontier.quantum, spendable)
    return frontier.bits_at(_first_within(frontier.least, float(frontier.least[spendable])))


def allocate_for_kl(rows: Sequence[SensitivityRow], bound: float) -> dict[str, int]:
    """The widths of least mean whose predicted KL is at most `bound` nats a token, by unit.

    Raises UsageError where no widths that were measured reach the bound.
    """
    frontier = _frontier(_units(rows))
    best = float(frontier.least[-1])
    if not best <= bound:
        raise UsageError(
            f"no widths that were measured keep the KL within {bound:.3g} nats a token: "
            f"the best predicts {best:.3g}",
            "allow more, or add a greater width to mixed_bits",
        )
    return frontier.bits_at(_first_within(frontier.least, bound))


def predicted_kl(rows: Sequence[SensitivityRow], bits: Mapping[str, int]) -> float:
    """The sum of the units' KL at these widths, nats a token; raises UsageError as below."""
    return sum((_chosen(unit, bits)[1] for unit in _units(rows)), 0.0)


def mean_bits(rows: Sequence[SensitivityRow], bits: Mapping[str, int]) -> float:
    """Code bits per weight over all units at these widths.

    Raises UsageError for a unit without a width, or with one that was not measured.
    """
    units = _units(rows)
    spent = sum(unit.parameters * _chosen(unit, bits)[0] for unit in units)
    return spent / sum(unit.parameters for unit in units)


def _units(rows: Sequence[SensitivityRow]) -> tuple[_Unit, ...]:
    by_name: dict[str, list[SensitivityRow]] = {}
    for row in rows:
        by_name.setdefault(row.unit, []).append(row)
    if not by_name:
        raise UsageError("there is no sensitivity to allocate bits by", "measure it: --analyze")
    units = []
    for name, found in by_name.items():
        widths = tuple(sorted((row.bits, row.kl) for row in found))
        if len({bits for bits, _ in widths}) < len(widths):
            raise UsageError(f"the sensitivity of {name} has a width twice")
        if len({row.parameters for row in found}) > 1:
            raise UsageError(f"the sensitivity of {name} is of several sizes")
        if not all(math.isfinite(kl) for _, kl in widths):
            raise UsageError(f"the sensitivity of {name} has a KL that is not finite")
        units.append(_Unit(name, found[0].parameters, widths))
    return tuple(units)


def _chosen(unit: _Unit, bits: Mapping[str, int]) -> tuple[int, float]:
    for width in unit.widths:
        if width[0] == bits.get(unit.name):
            return width
    measured = ", ".join(str(width) for width, _ in unit.widths)
    raise UsageError(f"{unit.name}: {bits.get(unit.name)} bits were not measured, but {measured}")


def _frontier(units: tuple[_Unit, ...]) -> _Frontier:
    """Unit by unit, the least KL for every amount that may be spent so far."""
    extra = [[unit.parameters * (b - unit.widths[0][0]) for b, _ in unit.widths] for unit in units]
    most = sum(costs[-1] for costs in extra)
    quantum = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    if most // quantum > _STATES:
        quantum = -(-most // _STATES)
    # Rounded up: what is not exact spends less than it may, never more.
    quanta = tuple(tuple(-(-cost // quantum) for cost in costs) for costs in extra)
    least: NDArray[np.float64] = np.zeros(1 + sum(costs[-1] for costs in quanta))
    choices = []
    for unit, costs in zip(units, quanta, strict=True):
        taken = np.zeros(len(least), dtype=np.int8)
        found = least + unit.widths[0][1]
        for number, cost in enumerate(costs[1:], 1):
            other = least[: len(least) - cost] + unit.widths[number][1]
            better = other < found[cost:]
            found[cost:][better] = other[better]
            taken[cost:][better] = number
        least = found
        choices.append(taken)
    return _Frontier(units, quanta, quantum, least, tuple(choices))


def _first_within(least: NDArray[np.float64], bound: float) -> int:
    """The first of the never rising values that is at most `bound`."""
    return int(np.argmax(least <= bound))
