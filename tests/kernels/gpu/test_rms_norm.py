"""RMSNorm, with a residual stream and rounding, against float64."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from infopt.kernels.gpu import rms_norm as module
from infopt.kernels.gpu.rms_norm import reference, rms_norm, rms_norm_rounded
from infopt.kernels.gpu.rounding import Rounding
from infopt.kernels.gpu.tile import Card

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}
"""Of float64, absolute and relative: the rounding of a result."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(
    dtype: torch.dtype, device: torch.device, columns: int = 75, gain: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that stand in wider ones, a gain, a stream."""
    torch.manual_seed(0)
    wide = torch.full((5, columns + 9), torch.nan)
    wide[:, :columns] = torch.randn(5, columns) * 3
    wide[1] = 0
    stream = torch.full((5, columns + 1), torch.nan)
    stream[:, :columns] = torch.randn(5, columns)
    weight = (torch.randn(columns) + 1).to(gain or dtype).to(device)
    x, residual = wide.to(dtype).to(device), stream.to(dtype).to(device)
    return x[:, :columns], weight, residual[:, :columns]


def check(
    dtype: torch.dtype,
    columns: int,
    residual: bool,
    gain: torch.dtype | None,
    device: torch.device,
    card: Card,
    kernels: ModuleType = module,
) -> None:
    x, weight, stream = make(dtype, device, columns, gain)
    before = stream.clone()
    found = kernels.rms_norm(card, x, weight, 1e-2, stream if residual else None)
    wanted = reference(x, weight, 1e-2, before if residual else None)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(stream, before + x if residual else before, atol=0, rtol=0)


@pytest.mark.parametrize("columns", [1, 64, 75, 1200])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_kernel_equals_reference(
    dtype: torch.dtype, residual: bool, columns: int, device: torch.device, card: Card
) -> None:
    check(dtype, columns, residual, None, device, card)


def test_a_gain_in_float32(device: torch.device, card: Card) -> None:
    check(BF16, 75, True, F32, device, card)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("/ columns\n", "/ BLOCK\n"),
        ("mean + eps", "mean"),
        ("values += tl.load(stream", "values = tl.load(stream"),
        ("tl.store(stream, kept, mask=there)\n", "tl.store(stream, values * 2, mask=there)\n"),
        ("row * x_stride", "row * columns"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(
    text: str,
    other: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    with pytest.raises(AssertionError, match="Tensor-likes"):
        check(F32, 75, True, None, device, card, mutated(module, text, other))


@pytest.mark.parametrize(
    "to", [Rounding(torch.int8, 127.5), Rounding(torch.float8_e4m3fn, 448.0)],
    ids=["int8", "float8"],
)  # fmt: skip
@pytest.mark.parametrize("residual", [False, True])
def test_rounded_as_it_would_be_afterwards(
    residual: bool, to: Rounding, device: torch.device, card: Card
) -> None:
    """To the last bit what the norm, and then the rounding of its result, give."""
    from infopt.kernels.gpu.rounding import round_rows

    for dtype in (F32, BF16):
        x, weight, stream = make(dtype, device)
        other = stream.clone()
        codes, scales = rms_norm_rounded(card, x, weight, 1e-5, to, stream if residual else None)
        normed = rms_norm(card, x, weight, 1e-5, other if residual else None)
        wanted_codes, wanted_scales = round_rows(card, normed, to)
        assert torch.equal(codes.float(), wanted_codes.float())
        assert torch.equal(scales, wanted_scales) and torch.equal(stream, other)
