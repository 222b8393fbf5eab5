"""Rows rounded to 8 bits: to the last bit what the activation formats say."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, input_steps
from infopt.kernels.gpu import rounding as module
from infopt.kernels.gpu.rounding import Rounding, reference, round_rows
from infopt.kernels.gpu.tile import Card

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
FORMATS = {
    "int8": ActivationFormat("int"),
    "int8, outliers": ActivationFormat("int", outlier_threshold=2.5),
    "float8": ActivationFormat("float"),
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rounding_of(form: ActivationFormat) -> Rounding:
    dtype = torch.int8 if form.kind == "int" else F8
    return Rounding(dtype, form.largest, form.outlier_threshold)


def rows(dtype: torch.dtype, device: torch.device) -> Tensor:
    torch.manual_seed(0)
    wide = torch.full((7, 108), torch.nan)
    wide[:, :100] = torch.randn(7, 100) * torch.logspace(-3, 3, 7)[:, None]
    wide[2] = 0
    wide[3, :100] = torch.arange(100) - 50 + 0.5  # halves, with a scale of a power of two
    wide[3, 0], wide[3, 99] = -127.5, 127.5
    return wide.to(dtype).to(device)[:, :100]


def check(name: str, dtype: torch.dtype, device: torch.device, card: Card, kernels=module) -> None:  # type: ignore[no-untyped-def]
    form, x = FORMATS[name], rows(dtype, device)
    codes, scales = kernels.round_rows(card, x, rounding_of(form))
    steps, scale = input_steps(x, form)
    torch.testing.assert_close(codes.float(), steps, atol=0, rtol=0)
    torch.testing.assert_close(scales, scale[:, 0], atol=0, rtol=0)
    plain = reference(x, rounding_of(form))
    assert torch.equal(plain[0].float(), codes.float()) and torch.equal(plain[1], scales)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", FORMATS)
def test_kernel_equals_the_format(
    name: str, dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    check(name, dtype, device, card)


@pytest.mark.parametrize(
    ("text", "other", "name"),
    [
        ("(steps + _EVEN) - _EVEN", "tl.floor(steps + 0.5)", "int8"),
        ("tl.max(tl.abs(values), axis=0)", "tl.max(values, axis=0)", "int8"),
        (">= threshold", "> threshold * 1.2", "int8, outliers"),
        ("scale = tl.where(scale == 0, 1.0, scale)", "scale = scale + 0.0", "float8"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_wrong_is_found(
    text: str,
    other: str,
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    with pytest.raises(AssertionError):
        check(name, F32, device, card, mutated(module, text, other))


def test_a_static_scale(device: torch.device, card: Card) -> None:
    form = ActivationFormat("int", strategy="tensor", dynamic=False)
    x, scale = rows(F32, device), torch.tensor([0.03], device=device)
    codes, scales = round_rows(card, x, rounding_of(form), scale)
    assert torch.equal(codes.float(), input_steps(x, form, scale)[0])
    assert torch.equal(scales, scale.expand(7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_not_finite_is_noticed(
    bad: float, fixed: bool, device: torch.device, card: Card
) -> None:
    x = torch.ones(2, 40, device=device)
    x[1, 17] = bad
    static = torch.ones(1, device=device) if fixed else None
    _, scales = round_rows(card, x, Rounding(torch.int8, 127.5), static)
    assert scales[0].isfinite() and not scales[1].isfinite()


def test_no_rows(device: torch.device, card: Card) -> None:
    codes, scales = round_rows(card, torch.ones(0, 8, device=device), Rounding(F8, 448.0))
    assert codes.shape == (0, 8) and scales.shape == (0,)
