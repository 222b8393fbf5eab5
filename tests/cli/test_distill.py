"""`infopt distill` as scripts and people meet it."""

import json
from pathlib import Path
from typing import Any

import pytest

from infopt.cli.main import run_app
from infopt.core.artifact.read import read_artifact

SHORT = ["--steps", "2", "--sequence-length", "32", "--batch-tokens", "64", "--micro-tokens", "32"]
SHORT += ["--precision", "float32", "--dtype", "float32"]


def made(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_a_student_is_cut_taught_and_reported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["distill", str(tiny_model), "--student", "layers=1", *SHORT, "--output", str(out)]
    assert run_app([*words, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "distill" and report["steps"] == 2
    assert set(report["perplexity"]) == {"teacher", "before", "after"}
    assert report["parameters"]["student"] < report["parameters"]["teacher"]
    assert 0 <= report["acceptance"]["after"]["greedy"] <= 1
    assert report["made"]["settings"]["student"] == "layers=1"
    assert made(out)["bytes"] == report["bytes"]
    assert read_artifact(out).config["num_hidden_layers"] == 1
    assert run_app(words) == 2, "it is there already"
    assert "exists already" in capsys.readouterr().err


def test_a_named_teacher_teaches_the_model(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["distill", str(tiny_model), "--teacher", str(tiny_model), *SHORT, "--quiet"]
    assert run_app([*words, "--output", str(out)]) == 0
    report = made(out)
    assert report["acceptance"]["before"]["greedy"] == 1.0
    assert report["losses"][0]["parts"]["loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "the student is missing"),
        (["--student", "layers=3"], 2, "2 layers, not 3"),
        (["--student", "layer=1"], 2, "did you mean 'layers'"),
        (["--student", "layers=1", "--loss", "kl"], 2, "forward-kl"),
        (["--student", "layers=1", "--alpha", "2"], 2, "alpha"),
        (["--student", "layers=1", "--medusa-heads", "2"], 2, "student is not read"),
        (["--student", "layers=1", "--top-k", "4", "--on-policy", "0.5"], 2, "on_policy"),
        (["--student", "no/such/place"], 2, "no/such/place"),
        (["--student", "layers=1", "--teacher", "TINY"], 2, "is not read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    words = [str(tiny_model) if word == "TINY" else word for word in words]
    out = tmp_path / "out"
    assert run_app(["distill", str(tiny_model), *words, "--output", str(out)]) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == "" and not out.exists()


def test_a_dry_run_changes_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["distill", str(tiny_model), "--student", "layers=0.5x", "-o", str(out)]
    assert run_app([*words, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"] == "distill" and "forward-kl" in plan["actions"][0]
    assert not out.exists()
