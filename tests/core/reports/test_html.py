"""The page of a report: well-formed, escaped, and it says what the report says."""

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from infopt.core.reports.bench import BenchReport
from infopt.core.reports.evaluate import BaselineQuality, EvaluateReport
from infopt.core.reports.html import to_html
from infopt.core.reports.quantize import (
    Allocation,
    LayerError,
    QuantizeReport,
    SensitivityReport,
    SensitivityRow,
)
from infopt.core.reports.run import RunReport, StepReport
from infopt.core.reports.schema import Environment, Making, ModelSummary, Report
from infopt.core.reports.store import save_html

SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"


def model(name: str = "tiny", **changes: Any) -> ModelSummary:
    values = {
        "name": name,
        "path": f"/models/{name}",
        "architecture": "LlamaForCausalLM",
        "parameters": 1_000_000,
        "bytes": 2_000_000,
    }
    return ModelSummary.model_validate(values | changes)


def layer(name: str, error: float, **changes: Any) -> LayerError:
    values = {
        "name": name,
        "error": error,
        "rtn_error": 0.02,
        "bits": 4,
        "group_size": 64,
        "damp": 0.01,
        "scheme": "int4 g64 sym",
        "seconds": 1.5,
        "tokens": 65_536,
    }
    return LayerError.model_validate(values | changes)


LAYERS = tuple(
    layer(f"model.layers.{block}.{part}", 0.0123 + 0.001 * block)
    for block in range(3)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)


def quantized(**changes: Any) -> QuantizeReport:
    values: dict[str, Any] = {
        "model": model(),
        "provenance": {"bytes": "measured", "bits_per_weight": "computed", "layers": "measured"},
        "output": "/out/tiny-w4",
        "method": "gptq",
        "scheme": "W4A16",
        "bits": 4,
        "group_size": 64,
        "symmetric": True,
        "format": "gptq",
        "bits_per_weight": 4.314,
        "bytes": 712_345,
        "original_bytes": 2_000_000,
        "calibration_tokens": 65_536,
        "resumed_blocks": 0,
        "seconds": 12.5,
        "peak_memory_bytes": 1_234_000_000,
        "logits_max_difference": 0.0,
        "layers": LAYERS,
    }
    return QuantizeReport.model_validate(values | changes)


def evaluated(of: ModelSummary, **changes: Any) -> EvaluateReport:
    values: dict[str, Any] = {
        "model": of,
        "provenance": {"perplexity": "measured", "model": "computed"},
        "text": "default",
        "text_sha256": "0" * 64,
        "protocol": "windows",
        "windows": 1,
        "context": 8,
        "stride": 8,
        "tokens": 7,
        "perplexity": 17.891,
        "nll": 2.8843,
        "characters": 30,
        "bits_per_character": 1.0,
        "tokens_per_s": 512.0,
        "dtype": "float32",
        "memory_bytes": 1,
        "baseline": BaselineQuality(model=model(), perplexity=16.987, nll=2.8324),
        "delta_nll": 0.0519,
        "kl_divergence": 0.0437,
        "top1_agreement": 0.8765,
    }
    return EvaluateReport.model_validate(values | changes)


def whole(*reports: Report) -> RunReport:
    steps = tuple(StepReport(verb=r.command, model="m", output=None, report=r) for r in reports)
    return RunReport(recipe="demo", steps=steps, seconds=20.0, provenance={"seconds": "measured"})


class Balanced(HTMLParser):
    """Raises where a tag is closed that was not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        fetching = {"src", "href", "action", "data"}
        assert not fetching & {name for name, _ in attrs}, "the page fetches nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(report: Report) -> tuple[ElementTree.Element, str]:
    """The page as a tree, and its text."""
    page = to_html(report)
    reader = Balanced()
    reader.feed(page)
    reader.close()
    assert not reader.open
    assert not {"script", "img", "link", "iframe"} & set(reader.tags)
    root = ElementTree.fromstring(page)
    return root, " ".join(" ".join(root.itertext()).split())


def marks(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    """Of the first plot, its legend left out."""
    figure = root.find(f".//{HTML}figure/{SVG}svg")
    assert figure is not None
    return [e for e in figure.iter() if e.get("class") == kind]


def test_the_page_of_an_artifact_says_its_numbers() -> None:
    fallen = layer("model.layers.1.mlp.up_proj", 0.5, fallback="rounded: no Cholesky factor")
    report = quantized(layers=(*LAYERS, fallen), warnings=("1 layer: rounded",))
    root, text = parsed(report)
    for found in (
        "gptq", "W4A16", "712 kB", "2 MB", "35.6%", "4.314", "12.5 s", "1.23 GB", "65,536",
        "1.230e-02", "0.615", "rounded: no Cholesky factor", "1 layer: rounded", "measured",
    ):  # fmt: skip
        assert found in text, found
    rows = root.findall(f".//{HTML}tbody/{HTML}tr")
    assert len(rows) == 10
    assert len(marks(root, "dot")) == 9
    assert len(marks(root, "ring")) == 1
    assert len(marks(root, "dash")) == 10


def test_a_larger_error_lies_higher_and_later_layers_further_right() -> None:
    report = quantized(layers=(layer("a.0.q", 0.001), layer("a.1.q", 0.1)))
    first, second = marks(parsed(report)[0], "dot")
    assert float(second.get("cy", "nan")) < float(first.get("cy", "nan"))
    assert float(second.get("cx", "nan")) > float(first.get("cx", "nan"))


def test_kinds_of_layers_have_their_own_colours() -> None:
    root, _ = parsed(quantized())
    assert len({mark.get("style") for mark in marks(root, "dot")}) == 3


@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf, 5e-324, 1e308])
def test_odd_errors_break_nothing(odd: float) -> None:
    report = quantized(
        layers=(layer("a.0.q", odd, rtn_error=odd), layer("a.1.q", 0.1)), bits_per_weight=odd
    )
    root, text = parsed(report)
    assert "nan" not in ElementTree.tostring(root, "unicode").lower().replace("nano", "")
    drawn = math.isfinite(odd) and odd > 0
    assert len(marks(root, "dot")) == 1 + drawn
    assert ("Not drawn" in text) is not drawn


def test_no_layers_and_nothing_known_of_the_making() -> None:
    _, text = parsed(quantized(layers=(), model=None, scheme=""))
    assert "4 bits, groups of 64, symmetric" in text
    assert "How it was made" not in text


def test_text_is_escaped_wherever_it_comes_from() -> None:
    evil = "<script>alert('&')</script>\x00\"]]>"
    report = quantized(
        model=model(evil),
        output=f"/out/{evil}",
        warnings=(evil,),
        layers=(layer(evil, 0.1, fallback=evil, scheme=evil),),
        allocation=Allocation(
            target_bits=3.5, max_ppl_increase=None, predicted_kl=0.1, mean_bits=3.5, bits={evil: 3}
        ),
        made=making(evil),
    )
    page = to_html(report)
    assert "<script" not in page and "\x00" not in page
    _, text = parsed(report)
    assert "<script>alert('&')</script>\N{REPLACEMENT CHARACTER}\"]]>" in text


def making(word: str = "x") -> Making:
    environment = Environment(
        infopt="0.1.0",
        python="3.11.7",
        platform="Linux",
        device=word,
        cpu="two cores",
        threads=2,
        memory_bytes=8_000_000_000,
        packages={"torch": "2.13.0"},
    )
    return Making(
        argv=("infopt", "quantize", word),
        settings={"bits": 4, "word": word},
        seed=7,
        created="2026-11-23T12:00:00+00:00",
        seconds=13.0,
        environment=environment,
    )


def test_the_foot_says_how_it_was_made() -> None:
    _, text = parsed(quantized(made=making("two words")))
    for found in ("infopt quantize 'two words'", "torch 2.13.0", '"bits": 4', "8 GB", "2026-11-23"):
        assert found in text, found


def test_an_allocation_is_told() -> None:
    found = Allocation(
        target_bits=None,
        max_ppl_increase=0.01,
        predicted_kl=0.0321,
        mean_bits=3.52,
        bits={"model.layers.0.self_attn.qkv": 4, "model.layers.0.mlp.down_proj": 3},
        measured_ppl_increase=0.0087,
    )
    _, text = parsed(quantized(allocation=found))
    for word in ("+1.00%", "0.0321", "3.520", "+0.87%", "model.layers.0.self_attn.qkv"):
        assert word in text, word


def test_sensitivity_has_a_plot_and_a_heat_map() -> None:
    rows = tuple(
        SensitivityRow(
            unit=f"model.layers.{n}.mlp.down_proj",
            layers=(f"model.layers.{n}.mlp.down_proj",),
            parameters=4096,
            bits=bits,
            kl=0.1 / bits**2 / (n + 1),
            delta_nll=-0.001,
        )
        for n in range(2)
        for bits in (2, 4)
    )
    odd = rows[0].model_copy(update={"kl": math.nan, "unit": "model.layers.2.mlp.down_proj"})
    report = SensitivityReport(
        model=model(),
        provenance={"sensitivity": "measured"},
        calibration_tokens=512,
        seconds=3.0,
        sensitivity=(*rows, odd),
        allocation=Allocation(
            target_bits=3.5,
            max_ppl_increase=None,
            predicted_kl=0.1,
            mean_bits=3.4567,
            bits={rows[0].unit: 4, rows[2].unit: 3},
        ),
    )
    root, text = parsed(report)
    assert "3.457" in text and "3.5 bits a weight" in text
    assert len(marks(root, "dot")) == 4
    assert "KL at 2" in text and "2.50e-02" in text and "not a number" in text
    heated = [e for e in root.iter() if "background" in (e.get("style") or "")]
    assert len(heated) == 4 + 2


def test_a_run_has_a_row_for_every_artifact() -> None:
    small = model("tiny-w4", path="/out/tiny-w4", bytes=712_345, quantization="gptq 4-bit g64 sym")
    bench = BenchReport(
        model=small, provenance={}, target="engine", requests=1, completed=1, failed=0, errors={},
        concurrency=1, duration_s=1.0, ttft_s=None, tpot_s=None, e2e_s=None, prompt_tokens=1,
        output_tokens=1, output_tokens_per_s=77.0, total_tokens_per_s=78.0,
        token_count_source="engine",
    )  # fmt: skip
    root, text = parsed(whole(quantized(), evaluated(small), bench))
    table = root.find(f".//{HTML}table")
    assert table is not None
    rows = [[c.text for c in row] for row in table.findall(f"{HTML}tbody/{HTML}tr")]
    assert [row[0] for row in rows] == ["tiny", "tiny-w4"]
    assert rows[0][2:8] == ["2 MB", "16.00", "–", "16.987", "+0.0000", "0.0000"]
    assert rows[1] == [
        "tiny-w4", "gptq W4A16", "712 kB", "5.70", "4.314", "17.891", "+0.0519", "0.0437",
        "87.65%", "77", "12.5 s", "1.23 GB",
    ]  # fmt: skip
    assert len(marks(root, "dot")) == 2, "size against quality"
    assert "Error by layer" in text, "the steps' own findings follow"


def test_an_evaluation_alone_compares_with_its_baseline() -> None:
    _, text = parsed(evaluated(model("small")))
    assert "0.8765" in text and "87.65%" in text
    _, text = parsed(evaluated(model("small"), baseline=None, delta_nll=None, kl_divergence=None))
    assert "17.891" in text


def test_any_other_report_is_a_table_of_its_findings() -> None:
    class Other(Report):
        command: str = "other"
        speed: float
        deep: dict[str, float | None]
        many: tuple[int, ...] = tuple(range(50))

    report = Other(
        provenance={"speed": "measured", "deep": "assumed"}, speed=1.25, deep={"a": None, "b": 2.5}
    )
    root, text = parsed(report)
    rows = [[c.text for c in row] for row in root.findall(f".//{HTML}tbody/{HTML}tr")]
    assert rows == [
        ["speed", "1.25", "measured"],
        ["deep.a", "–", "assumed"],
        ["deep.b", "2.5", "assumed"],
        ["many", "50 entries", None],
    ]
    assert "infopt other" in text


def test_the_page_is_kept(tmp_path: Path) -> None:
    save_html(quantized(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == to_html(quantized())
