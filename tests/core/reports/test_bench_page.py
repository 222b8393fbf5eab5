"""The pages of a bench and of a comparison: what is drawn lies where it should."""

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from infopt.core.reports.bench import BenchReport
from infopt.core.reports.bench_series import BenchSeries, Distribution, Timeline
from infopt.core.reports.compare import ComparedMetric, CompareReport
from infopt.core.reports.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from infopt.core.reports.html import to_html
from infopt.core.reports.schema import Percentiles, Report

SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [
    name
    for name, found in (("chromium", CHROMIUM), ("playwright", find_spec("playwright")))
    if not found
]
SCREENSHOT = "INFOPT_SCREENSHOT"
"""A file to write a picture of the bench's page to, such as docs/images/bench.png."""


class Full(BenchReport):
    """A report with all that a bench may tell."""

    slo: Any = None
    goodput: Any = None
    attainment: Any = None
    levels: Any = ()
    valid: Any = True
    invalid_reasons: Any = ()
    with_failures: Any = None
    itl_s: Any = None


def spread(scale: float) -> Percentiles:
    return Percentiles(
        mean=1.1 * scale,
        p50=scale,
        p90=1.6 * scale,
        p95=1.8 * scale,
        p99=2.5 * scale,
        min=0.4 * scale,
        max=3 * scale,
    )


def distribution(name: str, scale: float, level: int = 0) -> Distribution:
    """Its p50 is `scale`, as in `spread`."""
    values = tuple(scale * (0.4 + 1.2 * at / 100 if at <= 50 else at / 50) for at in range(101))
    return Distribution(level=level, name=name, values=values)


def level(number: int, rate: float) -> dict[str, Any]:
    return {
        "level": number,
        "concurrency": 2**number,
        "completed": 100,
        "failed": 0,
        "output_tokens_per_s": rate,
        "ttft_s": spread(0.05 * 2**number).model_dump(),
        "tpot_s": spread(0.01 * (1 + number)).model_dump(),
        "goodput": 3.0,
        "attainment": 0.97,
        "valid": True,
        "invalid_reasons": (),
    }


def benched(**changes: Any) -> Full:
    timeline = Timeline(
        start_s=0.0,
        slice_s=0.1,
        in_flight=tuple(min(8.0, 0.2 * at) for at in range(200)),
        output_tokens_per_s=tuple(100.0 + at % 7 for at in range(200)),
        failed=tuple(2 * (at == 150) for at in range(200)),
    )
    values: dict[str, Any] = {
        "provenance": {"ttft_s": "measured"},
        "target": "http://127.0.0.1:8000",
        "requests": 402,
        "completed": 400,
        "failed": 2,
        "errors": {"no whole answer within 600 s": 2},
        "concurrency": 8,
        "duration_s": 20.0,
        "ttft_s": spread(0.1),
        "tpot_s": spread(0.02),
        "e2e_s": spread(0.9),
        "prompt_tokens": 51_200,
        "output_tokens": 12_800,
        "output_tokens_per_s": 640.0,
        "total_tokens_per_s": 3200.0,
        "token_count_source": "usage",
        "slo": {"ttft": 0.2, "tpot": 0.05},
        "goodput": 18.5,
        "attainment": 0.925,
        "series": BenchSeries(
            distributions=tuple(
                distribution(name, scale)
                for name, scale in (("ttft", 0.1), ("tpot", 0.02), ("e2e", 0.9))
            ),
            timeline=timeline,
        ),
    }
    return Full.model_validate(values | changes)


def swept() -> Full:
    curves = [distribution("ttft", 0.05 * 2**n, n) for n in range(4)]
    curves += [distribution("tpot", 0.01 * (1 + n), n) for n in range(4)]
    return benched(
        levels=[level(n, 100.0 * (1 + n) - 25 * n * n) for n in range(4)],
        series=BenchSeries(distributions=tuple(curves), timeline=None),
    )


def metric(key: str, ratio: float, width: float, verdict: str) -> ComparedMetric:
    return ComparedMetric.model_validate(
        {
            "key": key,
            "a": 0.1,
            "b": 0.1 * ratio,
            "ratio": ratio,
            "low": ratio / (1 + width),
            "high": ratio * (1 + width),
            "joint_low": ratio / (1 + 2 * width),
            "joint_high": ratio * (1 + 2 * width),
            "samples_a": 300,
            "samples_b": 300,
            "verdict": verdict,
        }
    )


def compared(**changes: Any) -> CompareReport:
    values: dict[str, Any] = {
        "provenance": {"metrics": "computed"},
        "a": ("runs/a",),
        "b": ("runs/b",),
        "level": 0,
        "threshold": 0.05,
        "slo": {},
        "metrics": (
            metric("ttft_s.p50", 1.3, 0.05, "worse"),
            metric("tpot_s.p50", 1.0, 0.01, "equivalent"),
            metric("output_tokens_per_s", 0.97, 0.05, "no difference shown"),
        ),
        "verdict": "worse",
        "paired": True,
        "runs_drawn": False,
        "block_length": 7,
        "resamples": 2000,
        "seed": 0,
    }
    return CompareReport.model_validate(values | changes)


def figures(report: Report) -> dict[str, ElementTree.Element]:
    """The drawings of a page by their titles."""
    root = ElementTree.fromstring(to_html(report))
    found = root.findall(f".//{HTML}figure/{SVG}svg")
    return {svg.findtext(f"{SVG}title") or "": svg for svg in found}


def text(report: Report) -> str:
    return " ".join(" ".join(ElementTree.fromstring(to_html(report)).itertext()).split())


def points(svg: ElementTree.Element, kind: str = "line") -> list[list[tuple[float, float]]]:
    """The corners of each line of a class, in the figure's own units."""
    found = []
    for line in svg.findall(f"{SVG}polyline"):
        if (line.get("class") or "") == kind:
            pairs = (line.get("points") or "").split()
            found.append([(float(x), float(y)) for x, y in (p.split(",") for p in pairs)])
    return found


REPORTS = [benched(), swept(), compared()]


@pytest.mark.parametrize("report", REPORTS, ids=["bench", "sweep", "comparison"])
def test_all_that_is_drawn_lies_in_its_frame(report: Report) -> None:
    drawn = figures(report)
    assert drawn
    for svg in drawn.values():
        places = [p for line in svg.findall(f"{SVG}polyline") for p in corners(line)]
        places += [
            (float(c.get("cx", "nan")), float(c.get("cy", "nan")))
            for c in svg.findall(f"{SVG}circle")
        ]
        assert places
        assert all(LEFT <= x <= WIDTH - RIGHT for x, _ in places)
        assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in places)


def corners(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (line.get("points") or "").split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


def test_a_bench_has_its_pictures() -> None:
    assert list(figures(benched())) == [
        "TTFT",
        "TPOT",
        "End-to-end latency",
        "Requests in flight",
        "Output tokens a second",
    ]
    said = text(benched())
    for word in (
        "400 completed, 2 failed", "640 tokens/s", "18.5 requests/s", "92.5%", "TTFT 200 ms",
        "no whole answer within 600 s", "Latencies", "100 ms", "180 ms", "http://127.0.0.1:8000",
        "8 requests in flight", "SLO: 200 ms",
    ):  # fmt: skip
        assert word in said or word.replace("TTFT ", "ttft ") in said, word


def test_percentiles_are_marked_upon_the_line_of_the_distribution() -> None:
    svg = figures(benched())["TTFT"]
    rings = [
        (float(c.get("cx", "nan")), float(c.get("cy", "nan"))) for c in svg.findall(f"{SVG}circle")
    ]
    assert len(rings) == 3
    (line,) = points(svg)
    assert rings[0] == line[51], "p50, the point behind the one on the floor"
    labels = [e.text for e in svg.findall(f"{SVG}text") if e.get("class") == "label"]
    assert labels == ["p50 100 ms", "p95 180 ms", "p99 250 ms"]
    heights = [y for _, y in line]
    assert heights == sorted(heights, reverse=True), "a cumulative share never falls"
    (limit,) = points(svg, "line dashed")
    assert limit[0][0] == limit[1][0] and rings[1][0] < limit[0][0] < rings[2][0]


def test_without_limits_nothing_is_dashed() -> None:
    assert not points(figures(benched(slo={}))["TTFT"], "line dashed")


def test_a_sweep_is_a_curve_of_latency_and_throughput() -> None:
    drawn = figures(swept())
    assert list(drawn) == ["Latency and throughput", "TTFT", "TPOT"]
    ttft, tpot = points(drawn["Latency and throughput"])
    assert len(ttft) == len(tpot) == 4
    assert all(above[1] < below[1] for above, below in zip(ttft, tpot, strict=True))
    assert ttft[-1][0] < ttft[-2][0], "past its peak the curve turns back"
    assert len(points(drawn["TTFT"])) == 4
    assert "8 in flight" in text(swept())


def test_one_level_makes_no_curve() -> None:
    assert "Latency and throughput" not in figures(benched(levels=[level(0, 100.0)]))


def test_in_flight_is_drawn_to_scale() -> None:
    (line,) = points(figures(benched())["Requests in flight"])
    assert len(line) == 200
    assert line[0][1] == HEIGHT - BOTTOM and line[100][1] == line[199][1] < line[20][1]
    rings = figures(benched())["Requests in flight"].findall(f"{SVG}circle")
    assert len(rings) == 1 and "2 failed" in "".join(rings[0].itertext())


def test_reasons_why_a_run_does_not_count_are_grave() -> None:
    page = to_html(benched(valid=False, invalid_reasons=("the client was saturated",)))
    grave = ElementTree.fromstring(page).findall(f".//{HTML}ul[@class='grave']/{HTML}li")
    assert [item.text for item in grave] == ["Not a valid run: the client was saturated"]
    assert 'class="grave"' not in to_html(benched())


def test_failures_counted_have_a_row_with_infinity() -> None:
    tail = {"p50": 0.1, "p90": 0.2, "p95": 0.3, "p99": None, "infinite": ("p99",)}
    said = text(benched(with_failures={"ttft_s": tail}))
    assert "failures counted" in said and "infinite" in said
    assert "failures counted" not in text(benched())


def test_a_report_that_knows_little_has_a_page() -> None:
    bare = benched(series=None, ttft_s=None, tpot_s=None, e2e_s=None, errors={}, slo={})
    assert figures(bare) == {}
    one = Distribution(level=0, name="ttft", values=(0.5,))
    drawn = figures(benched(series=BenchSeries(distributions=(one,), timeline=None), slo={}))
    (line,) = points(drawn["TTFT"])
    assert line[0][0] == line[1][0] and line[0][1] > line[1][1]
    still = Timeline.model_validate(
        {"start_s": 0, "slice_s": 1, "in_flight": (0,), "output_tokens_per_s": (0,), "failed": (0,)}
    )
    assert len(figures(benched(series=BenchSeries(distributions=(), timeline=still)))) == 2


def test_ratios_lie_between_their_intervals_and_in_order() -> None:
    (svg,) = figures(compared()).values()
    dots = [(float(c.get("cx", "0")), float(c.get("cy", "0"))) for c in svg.findall(f"{SVG}circle")]
    thin, wide = points(svg), points(svg, "line wide-line")
    change, *thin = thin
    assert len(dots) == len(thin) == len(wide) == 3
    assert [y for _, y in dots] == sorted(y for _, y in dots)
    for (x, _), inner, outer in zip(dots, wide, thin, strict=True):
        assert outer[0][0] < inner[0][0] < x < inner[1][0] < outer[1][0]
    low, high = points(svg, "line dashed")
    assert low[0][0] < change[0][0] < high[0][0] < dots[0][0]
    assert dots[1][0] == pytest.approx(change[0][0], abs=0.1)
    labels = [e.text for e in svg.findall(f"{SVG}text")]
    assert {"ttft p50", "tpot p50", "tokens/s"} <= set(labels)


def test_a_comparison_says_its_figures_and_what_was_forced() -> None:
    said = text(compared(forced=("the loads differ",)))
    for word in ("+30.0%", "+23.8%", "worse", "equivalent", "7 consecutive requests", "runs/b"):
        assert word in said, word
    assert "Compared by force: the loads differ" in said
    none = metric("ttft_s.p50", 1.0, 0.1, "too few samples").model_copy(
        update=dict.fromkeys(("low", "high", "joint_low", "joint_high"))
    )
    assert figures(compared(metrics=(none,))) == {}


def test_an_infinite_interval_ends_at_the_frame() -> None:
    wide = metric("ttft_s.p50", 2.0, 0.1, "worse").model_copy(
        update={"high": float("inf"), "joint_high": float("inf")}
    )
    (svg,) = figures(compared(metrics=(wide,))).values()
    assert max(x for line in points(svg) for x, _ in line) == WIDTH - RIGHT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.parametrize("report", REPORTS, ids=["bench", "sweep", "comparison"])
def test_a_browser_draws_every_figure_and_fetches_nothing(
    report: Report, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(report))
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    asked: list[str] = []
    problems: list[str] = []
    tab.on("request", lambda each: asked.append(each.url))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto(file.as_uri())
    assert asked == [file.as_uri()] and problems == []
    boxes = tab.evaluate(
        """() => [...document.querySelectorAll("figure > svg")].map((svg) => {
            const box = (e) => { const b = e.getBoundingClientRect();
                                 return [b.left, b.top, b.right, b.bottom]; };
            return [box(svg), [...svg.querySelectorAll("polyline, circle")].map(box)];
        })"""
    )
    assert len(boxes) == len(figures(report))
    for (left, top, right, bottom), marks in boxes:
        assert right - left > 300 and marks
        for x0, y0, x1, y1 in marks:
            assert left <= x0 <= x1 <= right and top <= y0 <= y1 <= bottom
            assert x1 > x0 or y1 > y0
    if (picture := os.environ.get(SCREENSHOT)) and re.search(r"\[bench\]", request.node.name):
        tab.screenshot(path=picture, full_page=True)
    tab.close()
