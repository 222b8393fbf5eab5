"""Each op of a step against plain torch, at odd shapes, its outputs poisoned."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu import elementwise as ops
from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program

# Float32 sums in another order, and exponentials of another library.
NEAR = {"rtol": 2e-6, "atol": 2e-6}
WIDTHS = (1, 3, 16, 31, 64, 100, 577)


class Poisoned(Program):
    """Its buffers hold NaN until they are written."""

    def buffer(self, *width: int) -> Tensor:
        return super().buffer(*width).fill_(torch.nan)


@pytest.fixture(params=[1, 2], ids=["one thread", "two"])
def program(native: Native, request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    made = Poisoned(native, capacity=9, threads=request.param)
    made.rows = 7
    return made


def check(found: Tensor, wanted: Tensor, **near: Any) -> None:
    """The first rows are as wanted, and the others were left alone."""
    torch.testing.assert_close(found[: len(wanted)], wanted, **(near or NEAR))
    assert found[len(wanted) :].isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding(program: Program, dtype: torch.dtype, width: int) -> None:
    table, places = torch.randn(11, width).to(dtype), torch.randn(20, width)
    ids, positions = torch.randint(11, (9,)), torch.randint(20, (9,))
    x = ops.embed(program, ids, table, 1.5)
    ops.embed_onto(program, x, positions, places)
    program.run()
    wanted = ops.embed_reference(ids[:7], table, 1.5) + ops.embed_reference(positions[:7], places)
    check(x, wanted)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("adds", [False, True])
def test_norms(program: Program, width: int, bias: bool, adds: bool) -> None:
    x, added = (3 * torch.randn(9, width) + 1).contiguous(), torch.randn(9, width)
    weight, shift = torch.randn(width).bfloat16(), torch.randn(width) if bias else None
    whole = (x + added if adds else x)[:7].clone()
    x[7:] = torch.nan
    before = x.clone()
    out = ops.norm(program, x, weight, shift, 1e-5, added if adds else None)
    out.fill_(torch.nan)
    program.run()
    check(out, ops.norm_reference(whole, weight, shift, 1e-5), rtol=2e-5, atol=2e-5)
    check(x, whole if adds else before[:7], rtol=0, atol=0)


def test_a_norm_tells_of_what_is_not_finite(program: Program) -> None:
    x = torch.randn(9, 40)
    x[2, 3], x[4, 39] = torch.inf, torch.nan
    out = ops.norm(program, x, torch.ones(40), None, 1e-5)
    program.run()
    broken = [r for r in range(7) if not out[r].isfinite().all()]
    assert broken == [2, 4]


@pytest.mark.parametrize("width", WIDTHS)
def test_sums(program: Program, width: int) -> None:
    x, added = torch.randn(9, width), torch.randn(9, width)
    x[7:] = torch.nan
    wanted = (x + added)[:7]
    ops.add(program, x, added)
    program.run()
    check(x, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("half", [1, 4, 13, 32])
def test_angles(program: Program, half: int) -> None:
    positions = torch.tensor([0, 1, 17, 999, 4095, 32767, 100000, 3, 3])
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    cos, sin = ops.angles(program, positions, frequencies, 1.25)
    for each in (cos, sin):
        each.fill_(torch.nan)
    program.run()
    wanted = ops.angles_reference(positions[:7], frequencies, 1.25)
    check(cos, wanted[0])
    check(sin, wanted[1])


@pytest.mark.parametrize("inner", WIDTHS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("curve", ["silu", "relu", "gelu", "gelu_tanh"])
def test_gates(program: Program, curve: ops.Curve, gated: bool, inner: int) -> None:
    x = 4 * torch.randn(9, 2 * inner if gated else inner)
    x[3, 0], x[4, 0], x[5, 0] = 60.0, -60.0, torch.nan
    out = ops.gate(program, x, curve, gated)
    program.run()
    wanted = ops.gate_reference(x[:7], curve, gated)
    torch.testing.assert_close(out[:7], wanted, rtol=4e-6, atol=1e-5, equal_nan=True)
    assert out[7:].isnan().all()


@pytest.mark.parametrize("curve", ["silu", "relu", "gelu", "gelu_tanh"])
def test_what_is_not_finite_stays_so(program: Program, curve: ops.Curve) -> None:
    x = torch.full((9, 37), torch.nan)
    out = ops.gate(program, x, curve, False).zero_()
    program.run()
    assert out[:7].isnan().all()


@pytest.mark.parametrize("width", WIDTHS)
def test_caps(program: Program, width: int) -> None:
    x = 40 * torch.randn(9, width)
    x[7:] = torch.nan
    wanted = ops.cap_reference(x[:7], 30.0)
    ops.cap(program, x, 30.0)
    program.run()
    check(x, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_rounded_copies(program: Program, width: int) -> None:
    """By the op that made the numbers, and where none can any more, by one of its own."""
    x = torch.randn(9, width)
    x[1, 0], x[2, 0], x[3, 0] = torch.nan, torch.inf, 1 + 2**-8
    y = ops.norm(program, x, torch.ones(width), None, 1e-5)
    calls = len(program._calls)
    copies = [(y, program.rounded(y))]
    program.label = "gate"
    z = ops.gate(program, x, "relu", False)
    copies.append((z, program.rounded(z)))
    assert len(program._calls) == calls + 1
    program.label = "sum"
    ops.add(program, x, x.clone())
    copies.append((x, program.rounded(x)))
    assert len(program._calls) == calls + 3
    for _, copy in copies:
        copy.fill_(torch.nan)
    program.run()
    for held, copy in copies:
        wanted = held[:7].bfloat16()
        assert torch.equal(copy[:7].isnan(), wanted.isnan()) and copy[7:].isnan().all()
        assert torch.equal(copy[:7].nan_to_num(9.0, 1.0), wanted.nan_to_num(9.0, 1.0))


def test_no_row_depends_on_the_others(native: Native) -> None:
    """To the last bit: not on their number, nor on its place, nor on the threads."""
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(7, 166), torch.randn(166)

    def run(rows: Tensor, threads: int) -> Tensor:
        program = Program(native, len(rows), threads)
        program.rows = len(rows)
        held = rows.clone()
        gated = ops.gate(program, ops.norm(program, held, weight, None, 1e-6), "silu", True)
        ops.cap(program, gated, 2.0)
        program.run()
        return gated

    whole = run(x, 1)
    assert torch.equal(run(x, 2), whole)
    assert all(torch.equal(run(x[r : r + 1], 1)[0], whole[r]) for r in range(7))
    # Many rows, so that their work is shared.
    many = run(x.repeat(40, 1), 2)
    assert torch.equal(many, whole.repeat(40, 1))
