import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.errors import UsageError
from infopt.core.quantization import allocate as module
from infopt.core.quantization.allocate import allocate, allocate_for_kl, mean_bits, predicted_kl
from infopt.core.reports.quantize import SensitivityRow

WIDTHS = (2, 3, 4, 8)


def rows_of(table: dict[str, tuple[int, dict[int, float]]]) -> list[SensitivityRow]:
    return [
        SensitivityRow(
            unit=unit, layers=(unit,), parameters=parameters, bits=bits, kl=kl, delta_nll=0.0
        )
        for unit, (parameters, costs) in table.items()
        for bits, kl in costs.items()
    ]


@st.composite
def sensitivities(draw: st.DrawFn, units: int = 5) -> list[SensitivityRow]:
    """Units of any sizes; each with some widths, whose KL may even rise with the bits (noise)."""
    table = {}
    for number in range(draw(st.integers(1, units))):
        widths = draw(st.sets(st.sampled_from(WIDTHS), min_size=1))
        costs = {bits: draw(st.floats(0, 2, width=32)) for bits in sorted(widths)}
        table[f"unit{number}"] = (draw(st.integers(1, 40)), costs)
    return rows_of(table)


def all_choices(rows: list[SensitivityRow]) -> list[dict[str, int]]:
    widths: dict[str, list[int]] = {}
    for row in rows:
        widths.setdefault(row.unit, []).append(row.bits)
    return [dict(zip(widths, one, strict=True)) for one in itertools.product(*widths.values())]


def ends(rows: list[SensitivityRow]) -> tuple[float, float]:
    means = [mean_bits(rows, bits) for bits in all_choices(rows)]
    return min(means), max(means)


@settings(deadline=None, max_examples=150)
@given(rows=sensitivities(), share=st.floats(0, 1))
def test_a_target_is_kept_and_nothing_within_it_is_better(
    rows: list[SensitivityRow], share: float
) -> None:
    low, high = ends(rows)
    target = low + share * (high - low)
    found = allocate(rows, target)
    assert list(found) == list(dict.fromkeys(row.unit for row in rows))
    assert mean_bits(rows, found) <= target * (1 + 1e-11)
    fitting = [b for b in all_choices(rows) if mean_bits(rows, b) <= target * (1 + 1e-12)]
    best = min(predicted_kl(rows, bits) for bits in fitting)
    assert predicted_kl(rows, found) == pytest.approx(best, rel=1e-12, abs=1e-15)
    # Of those that are as good, none is narrower.
    equal = [mean_bits(rows, b) for b in fitting if predicted_kl(rows, b) == best]
    assert mean_bits(rows, found) <= min(equal) + 1e-12


@settings(deadline=None, max_examples=100)
@given(rows=sensitivities(12), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_more_bits_never_predict_a_larger_kl(
    rows: list[SensitivityRow], shares: tuple[float, float]
) -> None:
    least = {row.unit: (row.bits, row.parameters) for row in reversed(rows)}
    most = {row.unit: (row.bits, row.parameters) for row in rows}
    total = sum(size for _, size in least.values())
    low, high = (sum(b * n for b, n in end.values()) / total for end in (least, most))
    few, many = (low + share * (high - low) for share in sorted(shares))
    costs = [predicted_kl(rows, allocate(rows, target)) for target in (few, many)]
    assert costs[1] <= costs[0]


@settings(deadline=None, max_examples=150)
@given(rows=sensitivities(), share=st.floats(0, 1))
def test_a_bound_is_kept_with_the_fewest_bits(rows: list[SensitivityRow], share: float) -> None:
    costs = [predicted_kl(rows, bits) for bits in all_choices(rows)]
    bound = min(costs) + share * (max(costs) - min(costs))
    found = allocate_for_kl(rows, bound)
    assert predicted_kl(rows, found) <= bound
    fitting = [b for b in all_choices(rows) if predicted_kl(rows, b) <= bound]
    narrowest = min(mean_bits(rows, bits) for bits in fitting)
    assert mean_bits(rows, found) == pytest.approx(narrowest, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(rows=sensitivities(8), share=st.floats(0, 1), states=st.integers(20, 60))
def test_a_coarse_table_keeps_the_target_too(
    rows: list[SensitivityRow], share: float, states: int
) -> None:
    """Sizes with nothing in common: amounts are rounded up, so that the budget holds."""
    low, high = ends(rows)
    target = low + share * (high - low)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STATES", states)
        found = allocate(rows, target)
        assert mean_bits(rows, found) <= target * (1 + 1e-11)
        assert predicted_kl(rows, found) >= predicted_kl(rows, allocate(rows, high))
        best = min(predicted_kl(rows, bits) for bits in all_choices(rows))
        assert predicted_kl(rows, allocate(rows, high)) == pytest.approx(best, abs=1e-15)


def test_bits_go_where_they_save_the_most() -> None:
    rows = rows_of(
        {
            "robust": (100, {3: 0.010, 4: 0.008}),
            "fragile": (100, {3: 0.500, 4: 0.100}),
            "small and fragile": (20, {3: 0.300, 4: 0.100}),
        }
    )
    assert allocate(rows, 3.1) == {"robust": 3, "fragile": 3, "small and fragile": 4}
    found = allocate(rows, 3.55)
    assert found == {"robust": 3, "fragile": 4, "small and fragile": 4}
    assert mean_bits(rows, found) == pytest.approx(3 + 120 / 220)
    assert predicted_kl(rows, found) == pytest.approx(0.21)
    assert allocate_for_kl(rows, 0.21001) == found


def test_a_width_that_is_off_the_hull_is_taken_where_it_fits_best() -> None:
    rows = rows_of({"one": (10, {2: 1.0, 3: 0.9, 4: 0.0}), "two": (10, {2: 0.2, 4: 0.19})})
    assert allocate(rows, 2.5) == {"one": 3, "two": 2}
    assert allocate(rows, 3.0) == {"one": 4, "two": 2}


def test_bits_that_measured_no_better_are_not_spent() -> None:
    rows = rows_of({"one": (10, {4: 0.001, 8: 0.001}), "two": (10, {4: 0.002, 8: 0.003})})
    assert allocate(rows, 8.0) == {"one": 4, "two": 4}


def test_decimal_targets_are_met_exactly() -> None:
    rows = rows_of({f"unit{i}": (10, {3: 1.0 + i, 4: 0.0}) for i in range(10)})
    for tenths in range(11):
        found = allocate(rows, 3 + tenths / 10)
        assert sum(found.values()) == 30 + tenths


def test_a_model_of_many_large_units_is_quickly_done() -> None:
    """80 blocks, sizes whose only common divisor is 1."""
    table = {
        f"unit{i}": (10_000_019 + i * 7919, {b: (i % 7 + 1) * 4.0**-b for b in WIDTHS})
        for i in range(320)
    }
    rows = rows_of(table)
    found = allocate(rows, 4.5)
    assert 4.49 < mean_bits(rows, found) <= 4.5


@pytest.mark.parametrize("target", [1.9, 8.1, float("nan")])
def test_a_target_beyond_the_widths_names_their_range(target: float) -> None:
    rows = rows_of({"one": (10, {2: 1.0, 8: 0.0}), "two": (10, {2: 1.0, 8: 0.0})})
    with pytest.raises(UsageError, match="2 to 8 bits"):
        allocate(rows, target)


@pytest.mark.parametrize("bound", [0.0005, -1.0, float("nan")])
def test_a_bound_out_of_reach_names_the_best(bound: float) -> None:
    rows = rows_of({"one": (10, {2: 1.0, 8: 0.001})})
    with pytest.raises(UsageError, match=re.escape("the best predicts 0.001")):
        allocate_for_kl(rows, bound)


def test_rows_that_contradict_each_other_are_refused() -> None:
    good = rows_of({"one": (10, {3: 1.0, 4: 0.0})})
    with pytest.raises(UsageError, match="no sensitivity"):
        allocate([], 3.5)
    with pytest.raises(UsageError, match="one has a width twice"):
        allocate([*good, good[0]], 3.5)
    with pytest.raises(UsageError, match="one is of several sizes"):
        allocate([*good, *rows_of({"one": (11, {8: 0.0})})], 3.5)
    with pytest.raises(UsageError, match="not finite"):
        allocate([*good, *rows_of({"one": (10, {8: float("inf")})})], 3.5)
    with pytest.raises(UsageError, match="one: 5 bits were not measured, but 3, 4"):
        mean_bits(good, {"one": 5})
    with pytest.raises(UsageError, match="one: None bits"):
        predicted_kl(good, {})
