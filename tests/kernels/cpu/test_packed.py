"""Products appended to a program against the same products made at once, to the last bit."""

import pytest
import torch
from torch import Tensor

from infopt.kernels.cpu import packed
from infopt.kernels.cpu.dense import dense_linear, dense_rows, pack_dense
from infopt.kernels.cpu.elementwise import Curve, gate
from infopt.kernels.cpu.groups import groups_linear, pack_groups
from infopt.kernels.cpu.int8 import Grid, int8_linear, pack_int8
from infopt.kernels.cpu.native import Native
from infopt.kernels.cpu.program import Program

DTYPES = (torch.float32, torch.bfloat16)
ROWS, CAPACITY = 5, 7


def program_of(native: Native) -> Program:
    program = Program(native, CAPACITY, 2)
    program.rows = ROWS
    return program


def check(y: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """What was made at once is rounded to its dtype."""
    assert torch.equal(y[:ROWS].to(dtype), wanted)
    assert y[ROWS:].isnan().all()


@pytest.mark.parametrize("shape", [(1, 2), (33, 64), (130, 576)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(native: Native, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, bias = pack_dense(torch.randn(shape).to(dtype)), torch.randn(shape[0])
    x, program = torch.randn(CAPACITY, shape[1]), program_of(native)
    y = packed.dense(program, x, weight, bias).fill_(torch.nan)
    wide = torch.full((CAPACITY, shape[0] + 5), torch.nan)
    packed.dense(program, x, weight, bias, wide[:, 2 : 2 + shape[0]])
    program.run()
    check(y, dense_linear(native, x[:ROWS].to(dtype), weight, bias, threads=1), dtype)
    assert torch.equal(wide[:ROWS, 2:-3], y[:ROWS])
    assert wide[:, :2].isnan().all() and wide[:, -3:].isnan().all()


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("curve", ["silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("inner", "k", "rows"), [(32, 18, 5), (96, 576, 75)])
def test_gates_at_once_are_gates_after_a_product(
    native: Native, inner: int, k: int, rows: int, curve: Curve, keeps: bool
) -> None:
    torch.manual_seed(0)
    weight = pack_dense(torch.randn(2 * inner, k).bfloat16())
    program = Program(native, rows + 2, 2)
    program.rows = rows
    if not packed.takes_gates(program, weight):
        pytest.skip(f"{native.isa} has no such op")
    x = torch.randn(rows + 2, k)
    y = packed.gated(program, x, weight, curve, keeps=keeps).fill_(torch.nan)
    rounded = program.rounded(y).fill_(torch.nan)
    wanted = gate(program, packed.dense(program, x, weight, None), curve, True)
    program.run()
    assert torch.equal(rounded[:rows], wanted[:rows].bfloat16())
    assert torch.equal(y[:rows], wanted[:rows]) if keeps else y.isnan().all()
    assert y[rows:].isnan().all() and rounded[rows:].isnan().all()


def test_which_weights_gates_can_be_made_of(native: Native) -> None:
    """Whole panels of bfloat16 for gates and for ups."""
    program = program_of(native)
    for weight in (torch.zeros(64, 8), torch.zeros(96, 8).bfloat16()):
        assert not packed.takes_gates(program, pack_dense(weight))
    assert packed.takes_gates(program, pack_dense(torch.zeros(64, 8).bfloat16())) == (
        native.isa == "amx"
    )


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(native: Native, dtype: torch.dtype, bits: int, zeros: bool) -> None:
    torch.manual_seed(0)
    codes = torch.randint(1 << bits, (70, 192), dtype=torch.uint8)
    middle = torch.randint(1 << bits, (70, 3), dtype=torch.uint8) if zeros else 1 << (bits - 1)
    weight = pack_groups(codes, torch.rand(70, 3), middle, bits)
    x, program = torch.randn(CAPACITY, 192), program_of(native)
    y = packed.groups(program, x, weight, None, dtype=dtype).fill_(torch.nan)
    program.run()
    check(y, groups_linear(native, x[:ROWS].to(dtype), weight, None, threads=1), dtype)


@pytest.mark.parametrize("fixed", [False, True])
def test_int8(native: Native, fixed: bool) -> None:
    torch.manual_seed(0)
    weight = pack_int8(torch.randint(-128, 128, (70, 101), dtype=torch.int8), torch.rand(70))
    grid, bias = Grid(127.0, 128, torch.tensor([0.02]) if fixed else None), torch.randn(70)
    x, program = torch.randn(CAPACITY, 101), program_of(native)
    y = packed.int8(program, x, weight, grid, bias).fill_(torch.nan)
    program.run()
    check(y, int8_linear(native, x[:ROWS], weight, grid, bias, threads=1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns(native: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, ids = pack_dense(torch.randn(50, 38).to(dtype)), torch.randint(50, (CAPACITY,))
    program, order = program_of(native), torch.randperm(38, dtype=torch.int32)
    x = packed.packed_embed(program, ids, weight).fill_(torch.nan)
    y = packed.columns(program, x, order).fill_(torch.nan)
    rounded = program.rounded(y).fill_(torch.nan)
    program.run()
    wanted = dense_rows(native, weight, ids[:ROWS], threads=1).float()
    check(x, wanted, torch.float32)
    check(y, wanted[:, order], torch.float32)
    check(rounded, wanted[:, order].bfloat16(), torch.bfloat16)


def test_waiting_threads_are_told_what_is_read_next(native: Native) -> None:
    """Each call the weight of the next product behind it; those after the last, the first's."""
    program, x = program_of(native), torch.randn(CAPACITY, 64)
    first, second = (pack_dense(torch.randn(32, 64)) for _ in range(2))
    packed.dense(program, x, first, None)
    packed.columns(program, x, torch.arange(64, dtype=torch.int32))
    packed.dense(program, x, second, None)
    program.run()
    own = [(call.ahead, call.ahead_bytes) for call in program._calls]
    there = (second.panels.data_ptr(), second.nbytes)
    assert own == [there, there, (first.panels.data_ptr(), first.nbytes)]
