"""The bench of a GPU's kernels, under the interpreter and a clock that is made up."""

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch

from infopt.core.progress import silent
from infopt.kernels.gpu.tile import H100, Card

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted
CPU = torch.device("cpu")


def clock(*seconds: float) -> Callable[[Callable[[], object]], float]:
    """Runs the work, and says that it took each of these in turn."""

    def turns() -> Iterator[float]:
        while True:
            yield from seconds

    turn = turns()

    def timer(work: Callable[[], object]) -> float:
        work()
        return next(turn)

    return timer


@pytest.mark.parametrize("m", [1, 20])
def test_products_are_right_and_set_beside_limits(m: int) -> None:
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_kernels import product_rows

    torch.manual_seed(0)
    found = product_rows(
        Card.with_shipped(**H100), CPU, [form for form in PRODUCTS if form.kind != "int8"], (m,),
        ((64, 128),), cache_bytes=1, read=1e6, flops={"bfloat16": 1e9}, progress=silent,
        timer=clock(0.5, 1.0),
    )  # fmt: skip
    assert len(found) == len(PRODUCTS) - 1
    for row in found:
        assert row.right, row
        assert (row.seconds, row.torch_seconds, row.ratio) == (0.5, 1.0, 2.0)
        assert row.of_bandwidth == pytest.approx(row.bytes / 0.5 / 1e6)
        assert row.of_product == pytest.approx(2 * m * 64 * 128 / 0.5 / 1e9)


def test_the_fastest_of_torchs_ways_is_named() -> None:
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_kernels import product_rows

    (row,) = product_rows(
        Card.with_shipped(**H100), CPU, [form for form in PRODUCTS if form.kind == "int8"], (3,),
        ((64, 128),), cache_bytes=1, read=1.0, flops={"int8": 1.0}, progress=silent,
        timer=clock(3.0, 9.0, 6.0),
    )  # fmt: skip
    assert row.right and row.torch_kernel.startswith("_int_mm")
    assert (row.seconds, row.torch_seconds, row.ratio) == (3.0, 6.0, 2.0)


def test_copies_are_more_than_the_cache_holds() -> None:
    from infopt.core.bench.card_forms import ROW_OPS
    from infopt.core.bench.card_kernels import op_rows

    torch.manual_seed(0)
    ran: list[int] = []

    def timer(work: Callable[[], object]) -> float:
        found = work()
        assert isinstance(found, list)
        ran.append(len(found))
        return 8.0

    moved = 4 * 2 * 4096 * 2
    rows = op_rows(
        Card.with_shipped(**H100), CPU, ROW_OPS[:1], (2,), cache_bytes=2 * moved, read=1.0,
        progress=silent, timer=timer,
    )  # fmt: skip
    assert rows[0].bytes == moved and set(ran[:18]) == {4} and rows[0].seconds == 2.0
    assert all(row.right for row in rows)


def test_gates_and_samples() -> None:
    from infopt.core.bench.card_forms import ROW_OPS
    from infopt.core.bench.card_kernels import op_rows

    torch.manual_seed(0)
    found = op_rows(
        Card.with_shipped(**H100), CPU, ROW_OPS[1:2], (1,), cache_bytes=1, read=1.0,
        progress=silent, timer=clock(1.0, 2.0),
    )  # fmt: skip
    assert [row.op for row in found] == ["SwiGLU"] and found[0].right
    made = ROW_OPS[2].make(Card.with_shipped(**H100), 1, 700, CPU)
    assert 0 <= int(made.ours()) < 700 and made.torchs["sort"]().shape == (1, 1)  # type: ignore[call-overload,attr-defined]


def test_the_page_and_the_screen_tell_of_every_op() -> None:
    from rich.console import Console

    from infopt.cli.compared import kernels_table
    from infopt.core.bench.kernels import kernels_right
    from infopt.core.errors import NumericsError
    from infopt.core.reports.html import to_html
    from infopt.core.reports.kernels import KernelsReport, RowOpRow

    op = RowOpRow(
        op="SwiGLU", rows=2, columns=8, seconds=1.0, torch_seconds=2.0, torch_kernel="F.silu",
        ratio=2.0, bytes=3, bytes_per_s=3.0, of_bandwidth=0.5, error=0.5, tolerance=0.1,
        right=False,
    )  # fmt: skip
    report = KernelsReport(
        isa="Triton", threads=1, read_bytes_per_s=1.0, product_flops_per_s={}, rows=(), ops=(op,),
        provenance={key: "measured" for key in ("rows", "ops", "read_bytes_per_s")},
    )  # fmt: skip
    console = Console(record=True, width=160)
    console.print(kernels_table(report))
    assert "SwiGLU" in to_html(report) and "WRONG" in console.export_text()
    with pytest.raises(NumericsError, match="SwiGLU 2x8"):
        kernels_right(report)
