"""Reports keep their keys, and JSON stays JSON."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from infopt.core.reports.evaluate import EvaluateReport
from infopt.core.reports.run import RunReport, StepReport
from infopt.core.reports.schema import Plan
from infopt.core.reports.store import save, to_json


def evaluated(perplexity: float = 12.5) -> EvaluateReport:
    return EvaluateReport(
        provenance={"perplexity": "measured"},
        text="default",
        text_sha256="0" * 64,
        protocol="windows",
        windows=1,
        context=8,
        stride=8,
        tokens=7,
        perplexity=perplexity,
        nll=2.5,
        characters=30,
        bits_per_character=1.0,
        dtype="float32",
        tokens_per_s=100.0,
        memory_bytes=1,
    )


def test_findings_stand_at_the_top_level(tmp_path: Path) -> None:
    save(evaluated(), tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["command"] == "evaluate"
    assert values["schema_version"] == 1
    assert values["perplexity"] == 12.5
    assert EvaluateReport.model_validate(values) == evaluated()


def test_a_number_that_is_not_finite_becomes_null() -> None:
    assert json.loads(to_json(evaluated(math.inf)))["perplexity"] is None


def test_a_run_keeps_the_findings_of_its_steps() -> None:
    step = StepReport(verb="evaluate", model="m", output=None, report=evaluated())
    run = RunReport(recipe="r", steps=(step,), seconds=1.0, provenance={"seconds": "measured"})
    assert json.loads(to_json(run))["steps"][0]["report"]["perplexity"] == 12.5


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Plan.model_validate({"command": "x", "actions": [], "memory_bytes": 1, "extra": 1})
