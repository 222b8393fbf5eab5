"""The pages and short forms of prune, distill, Medusa heads and joined heads."""

from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from infopt.cli.summary import summary
from infopt.core.reports.curves import curves
from infopt.core.reports.distill import DistillReport
from infopt.core.reports.html import to_html
from infopt.core.reports.kv_heads import KvHeadsReport
from infopt.core.reports.medusa import MedusaReport
from infopt.core.reports.prune import PruneReport
from infopt.core.reports.schema import ModelSummary, Report

MODEL = ModelSummary(
    name="tiny", path="/models/tiny", architecture="L", parameters=10**6, bytes=2 * 10**6
)
HEAD = {
    "model": MODEL,
    "provenance": {"perplexity": "measured", "seconds": "measured"},
    "output": "/out/made",
    "seconds": 12.5,
    "peak_memory_bytes": 5 * 10**8,
}
SIZES = {"bytes": 10**6, "original_bytes": 2 * 10**6}
DRAFT = {"text": 0.31, "greedy": 0.42, "mean_run": 1.17}


def prune() -> PruneReport:
    part = {"name": "model.layers.0.mlp.down_proj", "total": 400, "removed": 200, "error": 0.0123}
    values: dict[str, Any] = {
        **HEAD,
        **SIZES,
        "method": "wanda",
        "pattern": "2:4",
        "sparsity": 0.5,
        "parameters": 10**6,
        "original_parameters": 10**6,
        "perplexity": {"dense": 11.91, "pruned": 47.33, "recovered": 21.77},
        "calibration_tokens": 4096,
        "resumed_blocks": 0,
        "logits_max_difference": 0.0,
        "retraining": {
            "steps": 2,
            "tokens": 8192,
            "seconds": 3.0,
            "source": "dense",
            "losses": (1.5, 0.75),
            "held_out": ({"step": 0, "nll": 3.9}, {"step": 2, "nll": 3.1}),
            "recovered_share": 0.56,
        },
        "layers": (part,),
    }
    return PruneReport.model_validate(values)


def distill() -> DistillReport:
    quality = {"teacher": 2.48, "before": 7.25, "after": 3.61}
    values: dict[str, Any] = {
        **HEAD,
        **SIZES,
        "teacher": MODEL,
        "student": MODEL,
        "loss": "forward-kl",
        "parameters": {"teacher": 10**6, "student": 4 * 10**5, "share": 0.4},
        "nll": quality,
        "perplexity": {"teacher": 11.9, "before": 1408.0, "after": 36.9},
        "acceptance": {
            "drafted": 4,
            "text_tokens": 100,
            "greedy_tokens": 100,
            "before": {"text": 0.0, "greedy": 0.0, "mean_run": 0.0},
            "after": DRAFT,
        },
        "steps": 2,
        "tokens": 8192,
        "resumed_steps": 0,
        "losses": (
            {"step": 1, "parts": {"loss": 4.5, "ce": 7.0}},
            {"step": 2, "parts": {"loss": 2.25, "ce": 6.5}},
        ),
        "held_out": ({"step": 0, "nll": 7.2},),
        "logits_max_difference": 0.0,
    }
    return DistillReport.model_validate(values)


def medusa() -> MedusaReport:
    head = {"top1": 0.31, "top5": 0.52, "unigram_top1": 0.06, "unigram_top5": 0.17}
    values: dict[str, Any] = {
        **HEAD,
        "bytes": 10**5,
        "medusa_heads": 1,
        "medusa_layers": 1,
        "projection": "shared",
        "targets": "greedy",
        "base_fingerprint": "f" * 64,
        "parameters": 331_776,
        "vocabulary": 8192,
        "covered": 0.987,
        "steps": 1,
        "training_tokens": 4096,
        "resumed_steps": 0,
        "losses": (6.5,),
        "held_out": ({"step": 1, "loss": 6.25},),
        "held_out_tokens": 4095,
        "heads": ({**head, "head": 0, "agreement": None}, {**head, "head": 1, "agreement": 0.44}),
        "mean_run": 0.61,
    }
    return MedusaReport.model_validate(values)


def kv_heads() -> KvHeadsReport:
    values: dict[str, Any] = {
        **HEAD,
        **SIZES,
        "kv_heads": 1,
        "original_kv_heads": 3,
        "query_heads": 9,
        "kv_bytes_per_token": 7680,
        "original_kv_bytes_per_token": 23040,
        "perplexity": {"dense": 11.91, "converted": 94.5, "uptrained": None},
        "uptrain_steps": 0,
        "training_tokens": 0,
        "resumed_steps": 0,
        "losses": (),
        "held_out": (),
        "layers": ({"name": "model.layers.0.self_attn.k_proj.weight", "spread": 0.614},),
        "logits_max_difference": 0.0,
    }
    return KvHeadsReport.model_validate(values)


CASES: list[tuple[Report, tuple[str, ...], tuple[str, ...]]] = [
    (prune(), ("47.33", "21.77", "50.000%", "down_proj", "56.0%"), ("47.3300", "2:4", "56%")),
    (distill(), ("1408", "3.61", "0.42", "400,000"), ("42.0%", "1.17 of 4", "40.0%")),
    (
        medusa(),
        ("31.0%", "44.0%", "17.0%", "331,776", "8,192", "98.7%"),
        ("31.0%", "0.61", "98.7%"),
    ),
    (kv_heads(), ("7,680", "94.5", "0.614"), ("23,040 -> 7,680", "94.5000 joined")),
]


@pytest.mark.parametrize(("report", "page", "short"), CASES, ids=lambda case: type(case).__name__)
def test_page_and_short_form_say_what_was_found(
    report: Report, page: tuple[str, ...], short: tuple[str, ...]
) -> None:
    html = to_html(report)
    ElementTree.fromstring(html.partition(">")[2])
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as printed:
        console.print(summary(report))
    assert [word for word in page if word not in html] == []
    assert [word for word in short if word not in printed.get()] == []


def test_a_curve_places_every_step_and_names_its_ends() -> None:
    figure = curves("Loss", "nats", {"a": [(1, 4.0), (2, 2.0), (3, 1.0)], "b": []})
    assert figure is not None
    assert len(figure.marks) == 3
    assert figure.marks[0].y < figure.marks[2].y, "the page's y runs downwards"
    assert figure.marks[0].x < figure.marks[1].x < figure.marks[2].x
    assert "a from 4 to 1" in figure.description and "b was not measured" in figure.description
    assert curves("Loss", "nats", {"a": []}) is None


def test_a_long_curve_keeps_its_last_step() -> None:
    line = [(step, 1 / step) for step in range(1, 2001)]
    figure = curves("Loss", "nats", {"a": line})
    assert figure is not None
    assert len(figure.marks) <= 301
    assert figure.marks[-1].title.startswith("a, step 2000")
