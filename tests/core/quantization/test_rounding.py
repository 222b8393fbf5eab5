"""Layers that share an input, rounded together: the codes of each alone, and what is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.compression.statistics import InputStatistics, relative_error
from infopt.core.errors import NumericsError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, Fp8Weight, to_fp8
from infopt.core.formats.nf4 import Nf4Format, Nf4Weight, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, WeightFormat
from infopt.core.quantization import rounding
from infopt.core.quantization.awq import clipped_grids
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.quantization.rounding import Layer, report_rounded, round_layers
from infopt.core.recipe.quantize import QuantizeSettings

INT4 = IntegerFormat(4, True, 32)
COLUMNS = 96


def settings(**values: Any) -> QuantizeSettings:
    return QuantizeSettings.model_validate({"calibration": {"samples": 8}, **values})


def inputs(rows: int = 1024, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    return torch.randn(rows, COLUMNS, generator=generator) @ mix


def known(x: Tensor, original: Tensor | None = None) -> InputStatistics:
    drift = None if original is None else 2 * (original - x).T @ x / len(x)
    return InputStatistics(2 * x.T @ x / len(x), len(x), drift=drift)


def layers(
    form: WeightFormat = INT4, sizes: tuple[int, ...] = (16, 8, 24), **how: Any
) -> list[Layer]:
    generator = torch.Generator().manual_seed(3)
    return [
        Layer(
            f"layer{n}", torch.randn(size, COLUMNS, generator=generator), LayerScheme(form), **how
        )
        for n, size in enumerate(sizes)
    ]


def equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    parts = ("codes", "scales", "zeros", "group_index")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_together_they_are_what_each_is_alone(method: str) -> None:
    wanted, statistics = settings(method=method), known(inputs())
    together = list(round_layers(layers(), statistics, wanted))
    alone = [next(round_layers([layer], statistics, wanted)) for layer in layers()]
    assert [found.row.name for found in together] == ["layer0", "layer1", "layer2"]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one.weight, QuantizedWeight) and isinstance(other.weight, QuantizedWeight)
        assert equal(one.weight, other.weight)
        assert one.row.error == pytest.approx(other.row.error)
        assert one.row.rtn_error == pytest.approx(other.row.rtn_error)


def test_the_row_tells_what_was_done() -> None:
    activation = ActivationFormat("int", 8)
    layer = replace(layers()[0], scheme=LayerScheme(INT4, activation))
    statistics = known(inputs())
    found = next(round_layers([layer], statistics, settings(damp_percent=0.02)))
    assert isinstance(found.weight, QuantizedWeight)
    row = found.row
    assert (row.bits, row.group_size, row.damp, row.tokens) == (4, 32, 0.02, 1024)
    assert row.scheme == "int4 g32 sym, int8 inputs per token" and row.fallback is None
    assert row.error == relative_error(layer.weight, found.weight.dequantize(), statistics.hessian)
    nearest = quantize_nearest(layer.weight, INT4, group_grids(layer.weight, INT4, mse=True))
    assert row.rtn_error == relative_error(layer.weight, nearest.dequantize(), statistics.hessian)
    assert row.error < row.rtn_error


def test_the_time_is_shared_by_size() -> None:
    rows = [found.row for found in round_layers(layers(), known(inputs()), settings())]
    assert all(row.seconds > 0 for row in rows)
    assert rows[0].seconds == pytest.approx(2 * rows[1].seconds)
    assert rows[2].seconds == pytest.approx(3 * rows[1].seconds)


def test_without_inputs_every_input_counts_the_same() -> None:
    layer = layers()[0]
    row = next(round_layers([layer], None, settings(method="rtn"))).row
    nearest = quantize_nearest(layer.weight, INT4, group_grids(layer.weight, INT4, mse=True))
    assert row.error == row.rtn_error == relative_error(layer.weight, nearest.dequantize(), None)
    assert row.tokens == 0


def test_the_error_of_the_layer_as_it_was_is_kept() -> None:
    layer = replace(layers()[0], rtn_error=0.125)
    assert next(round_layers([layer], known(inputs()), settings())).row.rtn_error == 0.125


@pytest.mark.parametrize("mse", [True, False])
def test_the_kind_of_grid_is_read(mse: bool) -> None:
    layer = layers()[0]
    wanted = settings(method="rtn", grid="mse" if mse else "minmax")
    found = next(round_layers([layer], None, wanted)).weight
    grid = group_grids(layer.weight, INT4, mse=mse)
    assert isinstance(found, QuantizedWeight)
    assert equal(found, quantize_nearest(layer.weight, INT4, grid))


def test_ranges_are_searched_by_the_error_of_the_outputs_where_asked() -> None:
    statistics = known(inputs())
    wanted = settings(method="awq")
    (plain,) = round_layers(layers(sizes=(16,)), statistics, wanted)
    (clipped,) = round_layers(layers(sizes=(16,), clips=True), statistics, wanted)
    weight = layers(sizes=(16,))[0].weight
    grid = clipped_grids(weight, statistics.hessian, INT4)
    assert isinstance(clipped.weight, QuantizedWeight)
    assert equal(clipped.weight, quantize_nearest(weight, INT4, grid))
    assert clipped.row.error < plain.row.error == plain.row.rtn_error == clipped.row.rtn_error


@pytest.mark.parametrize("rows", [0, 1, 127])
def test_a_starved_layer_is_rounded_to_nearest_and_told(rows: int) -> None:
    layer = layers()[0]
    statistics = known(inputs(rows)) if rows else InputStatistics(torch.zeros(96, 96), 0)
    found = next(round_layers([layer], statistics, settings()))
    grid = group_grids(layer.weight, INT4, mse=True)
    assert isinstance(found.weight, QuantizedWeight)
    assert equal(found.weight, quantize_nearest(layer.weight, INT4, grid))
    assert found.row.fallback == f"rtn: only {rows} tokens reached this layer"
    assert (found.row.tokens, found.row.damp) == (rows, 0.0)


def test_little_text_in_all_is_no_starvation() -> None:
    few = settings(calibration={"samples": 1, "sequence_length": 64})
    found = next(round_layers(layers(), known(inputs(64)), few))
    assert found.row.fallback is None and found.row.damp > 0


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_gptaq_lowers_the_error_against_the_original_models_outputs(share: float) -> None:
    original = inputs()
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(9))
    x = 0.9 * original + 0.2 * noise
    statistics = known(x, original)
    layer = layers(sizes=(48,))[0]

    def drifted(gptaq: float) -> tuple[float, Tensor]:
        found = next(round_layers([layer], statistics, settings(bits=4, gptaq=gptaq))).weight
        assert isinstance(found, QuantizedWeight)
        expected = original @ layer.weight.T
        error = (x @ found.dequantize().T - expected).square().sum()
        return float(error / expected.square().sum()), found.codes

    plain, corrected = drifted(0.0), drifted(share)
    assert corrected[0] < plain[0] and not torch.equal(plain[1], corrected[1])


def test_layers_of_unlike_schemes_are_solved_apart() -> None:
    narrow = replace(layers()[1], scheme=LayerScheme(IntegerFormat(2, True, 32)))
    mixed = [layers()[0], narrow, layers()[2]]
    found = list(round_layers(mixed, known(inputs()), settings()))
    assert [result.row.bits for result in found] == [4, 2, 4]
    assert int(found[1].weight.codes.max()) <= 3
    assert [len(result.weight.codes) for result in found] == [16, 8, 24]


def test_what_is_too_tall_is_solved_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = known(inputs())
    whole = list(round_layers(layers(), statistics, settings()))
    monkeypatch.setattr(rounding, "_TALL", 24 * COLUMNS)
    assert [len(batch) for batch in rounding._batches(layers())] == [2, 1]
    parts = list(round_layers(layers(), statistics, settings()))
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.weight.codes, other.weight.codes)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_fp8_scales_are_each_layers_own(strategy: Any) -> None:
    form = Fp8Format(strategy)
    found = list(round_layers(layers(form), None, settings(method="fp8")))
    for layer, result in zip(layers(form), found, strict=True):
        expected = to_fp8(layer.weight, form)
        assert isinstance(result.weight, Fp8Weight)
        assert torch.equal(result.weight.dequantize(), expected.dequantize())
        assert result.row.bits == 8 and result.row.group_size is None
        assert 0 < result.row.error == result.row.rtn_error < 0.01


@pytest.mark.parametrize("double", [True, False])
def test_nf4(double: bool) -> None:
    form = Nf4Format(double)
    found = next(round_layers(layers(form), None, settings(method="nf4", double_quant=double)))
    assert isinstance(found.weight, Nf4Weight)
    expected = quantize_nf4(layers(form)[0].weight, form)
    assert torch.equal(found.weight.dequantize(), expected.dequantize())
    assert (found.row.bits, found.row.damp, found.row.fallback) == (4, 0.0, None)


def test_weights_that_no_scale_reaches_are_named() -> None:
    broken = replace(layers()[1], weight=torch.full((8, COLUMNS), 3e38))
    with pytest.raises(NumericsError, match=r"layer0, layer1: .*too large"):
        list(round_layers([layers()[0], broken], None, settings(method="rtn")))


def test_a_layer_rounded_elsewhere_is_reported_alike() -> None:
    layer, statistics = layers()[0], known(inputs())
    done = next(round_layers([layer], statistics, settings(method="rtn")))
    assert isinstance(done.weight, QuantizedWeight)
    told = report_rounded(layer, done.weight, statistics, settings(method="rtn"), seconds=2.5)
    assert told.weight is done.weight and told.row.seconds == 2.5
    assert told.row.model_copy(update={"seconds": 0.0}) == done.row.model_copy(
        update={"seconds": 0.0}
    )


def test_the_weights_are_left_alone() -> None:
    mine = layers()
    before = [layer.weight.clone() for layer in mine]
    for method in ("rtn", "gptq"):
        list(round_layers(mine, known(inputs()), settings(method=method)))
    assert all(torch.equal(a.weight, b) for a, b in zip(mine, before, strict=True))
