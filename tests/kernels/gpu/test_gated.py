"""Gated activations, and their rounding, against float64."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.kernels.gpu import gated as module
from infopt.kernels.gpu.gated import ACTIVATIONS, gate, gate_rounded, reference
from infopt.kernels.gpu.rounding import Rounding, round_rows
from infopt.kernels.gpu.tile import Card

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {F32: 3e-6, F16: 1e-3, BF16: 8e-3}
"""Of float64, absolute and relative: fast exponentials, and the rounding of a result."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rows(dtype: torch.dtype, device: torch.device, columns: int = 75) -> Tensor:
    torch.manual_seed(0)
    wide = torch.full((5, 2 * columns + 9), torch.nan)
    wide[:, : 2 * columns] = torch.randn(5, 2 * columns) * 4
    return wide.to(dtype).to(device)[:, : 2 * columns]


def check(
    name: str, dtype: torch.dtype, columns: int, device: torch.device, card: Card,
    kernels: ModuleType = module,
) -> None:  # fmt: skip
    x, activation = rows(dtype, device, columns), ACTIVATIONS[name]
    found, wanted = kernels.gate(card, x, activation), reference(x, activation)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kernel_equals_reference(
    name: str, dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    check(name, dtype, 75, device, card)


@pytest.mark.parametrize("columns", [1, 64, 1100])
def test_rows_of_any_width(columns: int, device: torch.device, card: Card) -> None:
    check("silu", BF16, columns, device, card)


@pytest.mark.parametrize(
    ("text", "other", "name"),
    [
        ("gate * tl.sigmoid(gate)", "tl.sigmoid(gate)", "silu"),
        ("0.7071067811865476", "0.70", "gelu"),
        ("0.044715", "0.0447", "gelu_tanh"),
        ("tl.maximum(gate, 0.0)", "tl.maximum(gate, 0.1)", "relu"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(
    text: str,
    other: str,
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    with pytest.raises(AssertionError, match="not close"):
        check(name, F32, 75, device, card, mutated(module, text, other))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(
    "to", [Rounding(torch.int8, 127.5), Rounding(torch.float8_e4m3fn, 448.0)],
    ids=["int8", "float8"],
)  # fmt: skip
def test_rounded_as_it_would_be_afterwards(
    to: Rounding, name: str, dtype: torch.dtype, device: torch.device, card: Card
) -> None:
    x = rows(dtype, device)
    codes, scales = gate_rounded(card, x, ACTIVATIONS[name], to)
    wanted_codes, wanted_scales = round_rows(card, gate(card, x, ACTIVATIONS[name]), to)
    assert torch.equal(codes.float(), wanted_codes.float()) and torch.equal(scales, wanted_scales)


def test_no_rows(device: torch.device, card: Card) -> None:
    assert gate(card, rows(F32, device)[:0], 0).shape == (0, 75)
