"""The bench of a GPU's kernels, under the interpreter and a clock that is made up."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from infopt.core.errors import NumericsError, UsageError
from infopt.core.progress import silent
from infopt.kernels.gpu.tile import H100, Card

if TYPE_CHECKING:
    from infopt.core.bench.card_made import Made
    from infopt.core.bench.card_race import Rig

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted
CPU = torch.device("cpu")
FLOPS = {"bfloat16": 1e9, "int8": 1e9, "float8": 1e9}
PRODUCT_NAMES = (
    "W4A16 g128", "W3A16 g128", "W2A16 g64", "W8A16 channel", "NF4", "W8A8",
    "LLM.int8, threshold 4", "FP8 channel, A16", "FP8 blocks, A16", "FP8 x FP8, by row",
    "FP8 x FP8, by block",
)  # fmt: skip
OP_NAMES = (
    "sum and RMSNorm", "sum and RMSNorm to int8", "sum and RMSNorm to float8", "SwiGLU",
    "SwiGLU to int8", "SwiGLU to float8", "rows to int8", "rows to float8", "rotation and cache",
    "rotation and cache to int8", "rotation and cache to float8", "sample: top-k 50, top-p 0.9",
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "prompt": {"lengths": (70,), "contexts": (70,)},
    "prompts, ragged": {"lengths": (5, 33), "contexts": (5, 33)},
    "prompt, int8": {"lengths": (20,), "contexts": (20,), "held": torch.int8},
    "tokens": {"lengths": (1, 1), "contexts": (40, 40)},
    "tokens, ragged": {"lengths": (1, 1), "contexts": (17, 90)},
    "tokens, float8": {"lengths": (1,), "contexts": (33,), "held": torch.float8_e4m3fn},
    "trees": {"lengths": (6, 6), "contexts": (40, 40), "tree": True},
}


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


def rig_of(timer: Callable[[Callable[[], object]], float], **more: Any) -> "Rig":
    from infopt.core.bench.card_race import Rig

    torch.manual_seed(0)
    facts: dict[str, Any] = {"cache_bytes": 1, "read": 1e6, "flops": FLOPS, **more}
    return Rig(Card.with_shipped(**H100), CPU, progress=silent, timer=timer, **facts)


def test_every_format_has_its_product() -> None:
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_ops import ROW_OPS

    assert tuple(form.name for form in PRODUCTS) == PRODUCT_NAMES
    assert tuple(op.name for op in ROW_OPS) == OP_NAMES


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("number", range(len(PRODUCT_NAMES)), ids=PRODUCT_NAMES)
def test_products_are_right_and_set_beside_limits(number: int, m: int) -> None:
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_kernels import product_rows

    rig = rig_of(lambda work: 0.5 if work() else 0.0)
    (row,) = product_rows(rig, PRODUCTS[number : number + 1], (m,), ((64, 128),))
    assert row.right and not rig.failed, row
    assert (row.seconds, row.torch_seconds, row.ratio) == (0.5, 0.5, 1.0)
    assert row.of_bandwidth == pytest.approx(row.bytes / 0.5 / 1e6)
    assert row.of_product == pytest.approx(2 * m * 64 * 128 / 0.5 / 1e9)


@pytest.mark.parametrize("number", range(len(OP_NAMES)), ids=OP_NAMES)
def test_ops_are_right(number: int) -> None:
    from infopt.core.bench.card_kernels import op_rows
    from infopt.core.bench.card_ops import ROW_OPS

    rig = rig_of(lambda work: 0.5 if work() else 0.0)
    op = replace(ROW_OPS[number], columns=(384,))
    (row,) = op_rows(rig, [op], (5,))
    assert row.right and row.bytes > 0 and not rig.failed and not rig.left_out, row


@pytest.mark.parametrize("name", CASES)
def test_attention_is_right_and_torchs_is_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infopt.core.bench import card_attends
    from infopt.core.bench.card_attends import Attends
    from infopt.core.bench.card_kernels import attention_rows

    monkeypatch.setattr(card_attends, "_CHECKED", 16)  # the prompt of 70 is checked in pieces
    case = Attends(name, bound="reading", heads=6, kv_heads=2, head_dim=16, **CASES[name])
    rig = rig_of(lambda work: 0.5 if work() else 0.0)
    (row,) = attention_rows(rig, [case])
    assert row.right and row.ratio == 1.0 and not rig.failed and not rig.left_out, row
    assert row.of_product == pytest.approx(4 * case.pairs * 6 * 16 / 0.5 / 1e9)
    made = case.make(rig.card, CPU)
    found: Any = made.ours()
    (torchs,) = made.torchs.values()
    for one, out in zip(torchs(), of_each(case, found), strict=True):  # type: ignore[call-overload]
        largest = float(out.abs().max())
        torch.testing.assert_close(one.double(), out.double(), atol=2e-2 * largest, rtol=0)


def of_each(case: Any, out: Tensor) -> list[Tensor]:
    """Ours [T, heads, head_dim] as the calls of SDPA have it."""
    alike = len(set(case.contexts)) == len(set(case.lengths)) == 1
    parts = [out] if alike else list(out.split(case.lengths))
    found = []
    for part in parts:
        requests = len(case.lengths) if alike else 1
        rows = part.view(requests, -1, *part.shape[1:]).transpose(1, 2)
        if not case.whole_prompts:
            rows = rows.reshape(requests, case.kv_heads, -1, case.head_dim)
        found.append(rows)
    return found


def test_shapes_are_those_that_the_targets_speak_of() -> None:
    from infopt.core.bench.card_attends import ATTENDS

    prompts = [case for case in ATTENDS if case.name == "prompt"]
    assert [case.contexts for case in prompts] == [(8192,), (16384,)]
    for case in ATTENDS:
        assert case.head_dim == 128
        if case.bound == "reading":
            each = 2 * case.kv_heads * case.head_dim * case.held.itemsize
            assert sum(case.contexts) * each >= 256 * 2**20, case.name


def test_the_fastest_of_torchs_ways_is_named() -> None:
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_kernels import product_rows

    rig = rig_of(clock(3.0, 9.0, 6.0))
    forms = [form for form in PRODUCTS if form.name == "W8A8"]
    (row,) = product_rows(rig, forms, (3,), ((64, 128),))
    assert row.right and row.torch_kernel.startswith("_int_mm")
    assert (row.seconds, row.torch_seconds, row.ratio) == (3.0, 6.0, 2.0)


def _made(**parts: Any) -> "Made":
    from infopt.core.bench.card_made import Made

    one = torch.ones(3)
    whole: dict[str, Any] = {
        "ours": lambda: one, "torchs": {}, "error": lambda: 0.0, "nbytes": 1,
        "same": lambda found: found, **parts,
    }  # fmt: skip
    return Made(**whole)


def test_what_torch_cannot_do_or_does_otherwise_is_left_out() -> None:
    def fails() -> object:
        raise RuntimeError("no such kernel\nand more")

    torchs = {"right": lambda: torch.ones(3), "wrong": lambda: torch.zeros(3), "none": fails}
    rig = rig_of(clock(1.0))
    found = rig.race("op", lambda: _made(torchs=torchs), 0.1)
    assert found is not None and found["torch_kernel"] == "right"
    assert [note.split(": ")[1:] for note in rig.left_out] == [
        ["wrong is left out", "its result is 1.0e+00 away"],
        ["none is left out", "no such kernel"],
    ]
    alone = rig.race("op", lambda: _made(torchs={"none": fails}), 0.1)
    assert alone is not None and alone["ratio"] is None and alone["torch_kernel"] == "none"


def test_one_that_fails_does_not_lose_the_others() -> None:
    from infopt.core.bench.card_kernels import card_report
    from infopt.core.bench.kernels import kernels_right

    def fails() -> "Made":
        raise RuntimeError("out of resource: shared memory")

    rig = rig_of(clock(1.0))
    assert rig.race("op 1x2", fails, 0.1) is None
    report = card_report(rig, [], [], [])
    assert report.failed == ("op 1x2: RuntimeError: out of resource: shared memory",)
    with pytest.raises(NumericsError, match="op 1x2"):
        kernels_right(report)


def test_a_wrong_result_is_told() -> None:
    found = rig_of(clock(1.0)).race("op", lambda: _made(error=lambda: 0.3), 0.1)
    assert found is not None and not found["right"]
    from infopt.core.bench.card_made import near

    assert near(torch.tensor([float("nan"), 1.0]), torch.ones(2)) == float("inf")


def test_copies_are_more_than_the_cache_holds() -> None:
    from infopt.core.bench.card_kernels import op_rows
    from infopt.core.bench.card_ops import ROW_OPS

    ran: list[int] = []

    def timer(work: Callable[[], object]) -> float:
        found = work()
        assert isinstance(found, list)
        ran.append(len(found))
        return 8.0

    moved = 4 * 2 * 4096 * 2
    op = replace(ROW_OPS[0], columns=(4096,))
    (row,) = op_rows(rig_of(timer, cache_bytes=2 * moved), [op], (2,))
    assert row.bytes == moved and set(ran) == {4} and row.seconds == 2.0 and row.right


def test_tokens_that_may_not_be_chosen_are_wrong() -> None:
    from infopt.core.bench.card_ops import sampling_error
    from infopt.kernels.gpu.sample import Choosing

    numbers = {"temperature": 1.0, "top_p": 1.0, "log_min_p": -torch.inf, "uniform": 0.3}
    how = Choosing(
        **{name: torch.full((1,), value) for name, value in numbers.items()},
        top_k=torch.tensor([2], dtype=torch.int32),
    )
    logits = torch.tensor([[1.0, -5.0, 1.0]])
    assert sampling_error(torch.tensor([0]), logits, how) == 0.0
    assert sampling_error(torch.tensor([2]), logits, how) == pytest.approx(0.2)
    for token in (1, -1):
        assert sampling_error(torch.tensor([token]), logits, how) == float("inf")


def test_names_are_chosen_by_how_they_begin() -> None:
    from infopt.core.bench.card_kernels import check_names, is_named

    assert is_named("SwiGLU to int8", ["swiglu"]) and is_named("SwiGLU", None)
    assert not is_named("SwiGLU", ["W4A16", "tokens"])
    with pytest.raises(UsageError, match="no format or op 'W5'"):
        check_names(["W4", "W5"], PRODUCT_NAMES)


def test_the_page_and_the_screen_tell_of_every_op() -> None:
    from rich.console import Console

    from infopt.cli.compared import kernels_table
    from infopt.core.bench.card_attends import Attends
    from infopt.core.bench.card_kernels import attention_rows, card_report, op_rows
    from infopt.core.bench.card_ops import ROW_OPS
    from infopt.core.bench.kernels import kernels_right
    from infopt.core.reports.html import to_html
    from infopt.core.reports.kernels import KernelsReport

    rig = rig_of(clock(1.0, 2.0))
    case = Attends("prompt", (5,), (5,), "product", heads=2, kv_heads=1, head_dim=16)
    ops = op_rows(rig, [replace(ROW_OPS[3], columns=(8,), tolerance=-1.0)], (2,))
    report = card_report(rig, [], ops, attention_rows(rig, [case]))
    assert KernelsReport.model_validate_json(report.model_dump_json()) == report
    console = Console(record=True, width=200)
    console.print(kernels_table(report))
    page, text = to_html(report), console.export_text()
    assert "SwiGLU" in page and "Share of the limit" in page and "attention, prompt 5 of 5" in page
    assert "WRONG" in text and "SDPA, math" in text
    with pytest.raises(NumericsError, match="SwiGLU 2x8"):
        kernels_right(report)


@pytest.mark.gpu
def test_on_a_gpu_every_op_runs_and_is_right() -> None:
    """In small shapes, the way there is to the figures: graphs, torch's ways, limits."""
    from infopt.core.bench.card_attends import Attends
    from infopt.core.bench.card_forms import PRODUCTS
    from infopt.core.bench.card_kernels import attention_rows, op_rows, product_rows
    from infopt.core.bench.card_ops import ROW_OPS
    from infopt.core.bench.card_race import Rig

    device = torch.device("cuda")
    card = Card.at_hand(device)
    rig = Rig(card, device, 2**20, 1e12, dict.fromkeys(FLOPS, 1e15), silent)
    with torch.inference_mode():
        forms = [form for form in PRODUCTS if form.since <= card.capability]
        rows = [*product_rows(rig, forms, (1, 32), ((512, 1024),))]
        few = [replace(op, columns=(768,)) for op in ROW_OPS if op.since <= card.capability]
        ops = op_rows(rig, few, (4,))
        cases = [Attends(name, bound="reading", **more) for name, more in CASES.items()]
        attention = attention_rows(rig, cases)
    assert not rig.failed
    assert [row for row in (*rows, *ops, *attention) if not row.right] == []
