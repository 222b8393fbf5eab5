from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.compression.factor import inverse_factor
from infopt.core.compression.statistics import relative_error
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.quantization.gptq import GptqResult, gptq
from infopt.core.quantization.nearest import group_grids, quantize_nearest

FORMATS = [
    IntegerFormat(bits, symmetric, group_size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group_size in (32, 64, None)
]


def rounded(weight: Tensor, number_format: IntegerFormat, *, mse: bool = True) -> QuantizedWeight:
    return quantize_nearest(weight, number_format, group_grids(weight, number_format, mse=mse))


def run(
    weight: Tensor, hessian: Tensor, number_format: IntegerFormat, *, mse: bool = True, **how: Any
) -> GptqResult:
    grid = group_grids(weight, number_format, mse=mse)
    return gptq(weight, hessian, number_format, grid, mse=mse, **how)


def layer(outputs: int = 48, columns: int = 192, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2048, columns, generator=generator) @ mix
    inputs *= torch.rand(columns, generator=generator) * 3
    weight = torch.randn(outputs, columns, generator=generator)
    return weight, 2 * inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_a_diagonal_hessian_is_rounding_bit_for_bit(
    number_format: IntegerFormat, act_order: bool, mse: bool
) -> None:
    weight, hessian = layer()
    found = run(weight, hessian.diagonal().diag(), number_format, act_order=act_order, mse=mse)
    nearest = rounded(weight, number_format, mse=mse)
    for part in ("codes", "scales", "zeros", "group_index"):
        assert torch.equal(getattr(found.weight, part), getattr(nearest, part)), part
    assert found.fallback is None


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_it_beats_rounding(number_format: IntegerFormat, act_order: bool) -> None:
    weight, hessian = layer()
    found = run(weight, hessian, number_format, act_order=act_order)
    error = relative_error(weight, found.weight.dequantize(), hessian)
    nearest = rounded(weight, number_format).dequantize()
    # At 2 bits a symmetric grid clips a quarter of its range, and what is clipped is passed on.
    bound = 0.8 if number_format.bits > 2 else 1.1
    assert error < bound * relative_error(weight, nearest, hessian)


def reference(weight: Tensor, hessian: Tensor, number_format: IntegerFormat, damp: float) -> Tensor:
    """The paper's algorithm as it is told, in float64, without blocks, scales made at each turn."""
    work, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found = torch.empty_like(work)
    size = number_format.group_size or weight.shape[1]
    top, zero = number_format.max_code, number_format.middle
    for i in range(weight.shape[1]):
        if i % size == 0:
            scale = (2 * work[:, i : i + size].abs().amax(1) / top).bfloat16().double()
        code = (torch.round(work[:, i] / scale) + zero).clamp(0, top)
        found[:, i] = (code - zero) * scale
        error = (work[:, i] - found[:, i]) / factor[i, i]
        work[:, i:] -= error[:, None] * factor[i, i:][None]
    return found


@pytest.mark.parametrize("group_size", [32, 64, None])
def test_it_is_the_algorithm_of_the_paper(group_size: int | None) -> None:
    """Lazy blocks and the reversed factor change nothing; no group sees stale weights."""
    weight, hessian = layer(columns=320)
    number_format = IntegerFormat(4, True, group_size)
    found = run(weight, hessian, number_format, mse=False, act_order=False, damp=0.01)
    found = found.weight.dequantize()
    expected = reference(weight, hessian, number_format, 0.01)
    # A value at a border between two codes may fall to either side in float32, and its row differs
    # from there on: rows agree, or are equally good.
    same = (found.double() - expected).abs().amax(1) < 1e-3
    assert float(same.float().mean()) > 0.8
    errors = [relative_error(weight, q.float(), hessian) for q in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_size_of_lazy_blocks_does_not_matter(act_order: bool) -> None:
    weight, hessian = layer()
    number_format = IntegerFormat(4, True, 64)
    found = [
        run(weight, hessian, number_format, act_order=act_order, block=block).weight.dequantize()
        for block in (1, 64, 512)
    ]
    for other in found[1:]:
        assert relative_error(found[0], other, hessian) < 1e-3


def test_act_order_keeps_the_grids_of_rounding() -> None:
    weight, hessian = layer()
    number_format = IntegerFormat(3, False, 32)
    found = run(weight, hessian, number_format, act_order=True).weight
    nearest = rounded(weight, number_format)
    assert torch.equal(found.scales, nearest.scales) and torch.equal(found.zeros, nearest.zeros)
    assert torch.equal(found.group_index, nearest.group_index), "groups lie in order"


def test_the_same_input_gives_the_same_codes() -> None:
    weight, hessian = layer()
    number_format = IntegerFormat(4, True, 32)
    first, second = (run(weight, hessian, number_format).weight.codes for _ in range(2))
    assert torch.equal(first, second)


def test_the_arguments_are_left_alone() -> None:
    weight, hessian = layer()
    before = weight.clone(), hessian.clone()
    for act_order in (True, False):
        run(weight, hessian, IntegerFormat(4, True, 32), act_order=act_order)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_are_rounded_and_disturb_nothing(act_order: bool) -> None:
    weight, hessian = layer()
    hessian[40] = 0
    hessian[:, 40] = 0
    number_format = IntegerFormat(4, True, 32)
    found = run(weight, hessian, number_format, act_order=act_order)
    assert bool(torch.isfinite(found.weight.dequantize()).all()) and found.fallback is None
    if act_order:
        nearest = rounded(weight, number_format)
        assert torch.equal(found.weight.codes[:, 40], nearest.codes[:, 40])


def test_the_ladder_is_climbed_and_told() -> None:
    number_format = IntegerFormat(4, True, 32)
    weight, hessian = layer(columns=64)
    assert run(weight, hessian, number_format, damp=0.03).damp == 0.03

    # An eigenvalue of -0.04 of the mean: 0.01 and 0.02 do not reach it, 0.05 does.
    values = torch.ones(64)
    values[0] = -0.04 * 63
    values /= values.mean()
    values[0] = -0.04
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    found = run(weight, basis @ values.diag() @ basis.T, number_format)
    assert found.damp == 0.05 and found.fallback == "damping raised to 0.05"

    factor, _, told = inverse_factor(floor_case(), 0.01)
    assert factor is not None and told == "diagonal floored at its mean"

    hopeless = torch.full((64, 64), 3.0)
    hopeless.fill_diagonal_(1.0)
    result = run(weight, hopeless, number_format)
    assert result.fallback is not None and result.fallback.startswith("rtn")
    assert torch.equal(result.weight.codes, rounded(weight, number_format).codes)


def floor_case() -> Tensor:
    """Two strongly tied inputs of almost no power beside a large one: only the floor helps."""
    hessian = torch.diag(torch.tensor([0.01, 0.01, 2.98]))
    hessian[0, 1] = hessian[1, 0] = -1.2
    return hessian


def test_no_input_at_all_is_told() -> None:
    weight, _ = layer(columns=64)
    number_format = IntegerFormat(4, True, 32)
    result = run(weight, torch.zeros(64, 64), number_format)
    assert result.fallback is not None and "no input" in result.fallback
    assert torch.equal(result.weight.codes, rounded(weight, number_format).codes)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_zeros_of_a_pruned_weight_stay(act_order: bool, symmetric: bool) -> None:
    """2 of every 4 weights are gone: their codes stay those of 0, and the others make up for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    inputs = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = 2 * inputs.T @ inputs / 256
    small = weight.view(16, 16, 4).abs().topk(2, largest=False).indices
    weight = weight.view(16, 16, 4).scatter(-1, small, 0.0).view(16, 64)
    form = IntegerFormat(4, symmetric, 32)
    found = gptq(weight, hessian, form, group_grids(weight, form, mse=True), act_order=act_order)
    kept = found.weight.dequantize()
    assert bool((kept[weight == 0] == 0).all())
    nearest = quantize_nearest(weight, form, group_grids(weight, form, mse=True)).dequantize()
    losses = [float(((weight - q) @ hessian * (weight - q)).sum()) for q in (kept, nearest)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("drifts", [False, True], ids=["", "drift"])
def test_native_columns_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, act_order: bool, drifts: bool
) -> None:
    weight, hessian = layer()
    drift = 0.05 * torch.randn(hessian.shape, generator=torch.Generator().manual_seed(1))
    how = {"act_order": act_order, "drift": drift if drifts else None}
    native = run(weight, hessian, IntegerFormat(4, True, 64), **how).weight
    monkeypatch.setenv("INFOPT_KERNELS", "torch")
    torchs = run(weight, hessian, IntegerFormat(4, True, 64), **how).weight
    # Sums in another order put a few codes on the other side of an edge.
    assert float((native.codes == torchs.codes).float().mean()) > 0.99
    errors = [relative_error(weight, one.dequantize(), hessian) for one in (native, torchs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
