from collections.abc import Sequence

import pytest
import torch

from infopt.core.formats.activation import ActivationFormat
from infopt.core.layers.fuse import SideBySide, side_by_side
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.rounded import RoundedLinear

TOKEN = ActivationFormat("int")
STATIC = ActivationFormat("int", strategy="tensor", dynamic=False)


def dense(out: int, *, bias: bool = False) -> Linear:
    return Linear(torch.randn(out, 16), torch.randn(out) if bias else None)


def rounded(out: int, form: ActivationFormat = TOKEN, scale: float | None = None) -> RoundedLinear:
    return RoundedLinear(dense(out), form, None if scale is None else torch.tensor([scale]))


def int8(
    out: int, form: ActivationFormat = TOKEN, scale: float | None = None, *, bias: bool = True
) -> Int8Linear:
    codes = torch.randint(-128, 128, (out, 16), dtype=torch.int8)
    static = None if scale is None else torch.tensor([scale])
    return Int8Linear(codes, torch.rand(out), form, torch.randn(out) if bias else None, static)


CASES: dict[str, tuple[Sequence[Projection], type]] = {
    "dense": ((dense(4, bias=True), dense(2, bias=True)), Linear),
    "rounded": ((rounded(4), rounded(2), rounded(2)), RoundedLinear),
    "rounded, one static scale": (
        (rounded(4, STATIC, 0.1), rounded(2, STATIC, 0.1)),
        RoundedLinear,
    ),
    "rounded, two scales": ((rounded(4, STATIC, 0.1), rounded(2, STATIC, 0.2)), SideBySide),
    "int8": ((int8(4), int8(2), int8(2)), Int8Linear),
    "int8 without bias": ((int8(4, bias=False), int8(2, bias=False)), Int8Linear),
    "int8, one scale": ((int8(4, STATIC, 0.1), int8(2, STATIC, 0.1)), Int8Linear),
    "int8, two scales": ((int8(4, STATIC, 0.1), int8(2, STATIC, 0.2)), SideBySide),
    "int8 of two kinds": ((int8(4), int8(2, ActivationFormat("int", bits=4))), SideBySide),
    "all kinds": ((int8(4), rounded(2), dense(2)), SideBySide),
}


@pytest.mark.parametrize("case", CASES)
def test_side_by_side_is_each_part_alone(case: str) -> None:
    parts, kind = CASES[case]
    whole = side_by_side(parts)
    x = torch.randn(3, 16)
    assert isinstance(whole, kind)
    torch.testing.assert_close(whole(x), torch.cat([part(x) for part in parts], dim=-1))
    assert whole.nbytes == sum(part.nbytes for part in parts)
