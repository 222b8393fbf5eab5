"""Native kernels timed: every format right, against limits that were measured beside it."""

import pytest

from infopt.core.bench import kernels as module
from infopt.core.bench.kernel_forms import FORMS
from infopt.core.bench.kernels import bench_kernels, kernels_right
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.progress import silent
from infopt.core.reports.html import to_html
from infopt.core.reports.kernels import KernelsReport
from infopt.kernels.cpu.native import NativeError, NoLibraryError, load


@pytest.fixture(scope="module")
def report() -> KernelsReport:
    try:
        load()
    except NativeError as error:
        pytest.skip(str(error))
    return bench_kernels(rows=(1, 3), shapes=((96, 128),), threads=1, progress=silent)


def test_each_format_is_timed_and_right(report: KernelsReport) -> None:
    assert [(row.format, row.m) for row in report.rows] == [
        (form.name, m) for form in FORMS for m in (1, 3)
    ]
    for row in report.rows:
        assert row.right and row.error <= row.tolerance, row
        assert row.ratio == pytest.approx(row.torch_seconds / row.seconds)
        assert row.of_bandwidth == pytest.approx(row.bytes_per_s / report.read_bytes_per_s)
        assert row.bytes == pytest.approx(row.bytes_per_s * row.seconds)
        assert row.of_product > 0 and row.torch_kernel
    kernels_right(report)


def test_bytes_are_those_of_the_weight_and_the_rows(report: KernelsReport) -> None:
    found = {(row.format, row.m): row.bytes for row in report.rows}
    assert found["bfloat16", 1] == 96 * 128 * 2 + (96 + 128) * 2
    assert found["float32", 3] == 96 * 128 * 4 + 3 * (96 + 128) * 4
    assert found["W4A16 g64", 1] == 96 * 128 // 2 + 96 * 2 * 2 + (96 + 128) * 2


def test_a_product_that_is_wrong_fails(report: KernelsReport) -> None:
    wrong = report.rows[0].model_copy(update={"error": 1.0, "right": False})
    with pytest.raises(NumericsError, match="bfloat16 1x96x128"):
        kernels_right(report.model_copy(update={"rows": (wrong,)}))


def test_the_page_has_every_row(report: KernelsReport) -> None:
    text = to_html(report)
    assert "Native kernels" in text and all(form.name in text for form in FORMS)


def test_formats_that_are_not_known(report: KernelsReport) -> None:
    with pytest.raises(UsageError, match="no format 'W5'"):
        bench_kernels(formats=("W5",), progress=silent)


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_built() -> None:
        raise NoLibraryError("the native kernels were not built")

    monkeypatch.setattr(module, "load", none_built)
    with pytest.raises(UnsupportedError, match="were not built"):
        bench_kernels(progress=silent)
