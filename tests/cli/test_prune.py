"""`infopt prune` as scripts and people meet it."""

import json
from pathlib import Path

import pytest

from infopt.cli.main import run_app
from infopt.core.artifact.read import read_artifact
from infopt.core.recipe.prune import PruneSettings
from infopt.core.recipe.recipe import load_recipe

SMALL = ["--samples", "4", "--sequence-length", "32"]


def test_the_report_is_json_and_lies_beside_the_weights(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["prune", str(tiny_model), "--method", "sparsegpt", "--sparsity", "2:4", *SMALL]
    words += ["--output", str(out), "--json", "-"]
    assert run_app(words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["command"] == "prune" and report["sparsity"] == 0.5
    assert report["perplexity"]["dense"] > 1 and report["perplexity"]["pruned"] > 1
    assert report["perplexity"]["recovered"] is None
    assert "NVIDIA" in captured.err
    assert json.loads((out / "report.json").read_text())["pattern"] == "2:4"
    step = load_recipe(out / "recipe.yaml").steps[0]
    assert isinstance(step.settings, PruneSettings) and step.settings.sparsity == "2:4"
    assert run_app(words) == 2, "it is there already"
    assert "exists already" in capsys.readouterr().err


def test_retraining_is_reported(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["prune", str(tiny_model), "--sparsity", "0.5", "--retrain", "2", *SMALL]
    words += ["--retrain-tokens", "64", "--retrain-length", "32", "-o", str(out), "--quiet"]
    assert run_app(words) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"]["recovered"] > 1 and report["retraining"]["steps"] == 2
    assert len(report["retraining"]["losses"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "1.2"], "between 0 and 1"),
        (["--sparsity", "5:4"], "0 < N < M"),
        (["--layers", "1", "--sparsity", "0.5"], "sparsity is read by"),
        (["--learning-rate", "1e-3"], "goes with retrain"),
    ],
)
def test_a_bad_request_is_one_line(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    assert run_app(["prune", str(tiny_model), *words, "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_changes_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["prune", str(tiny_model), "--sparsity", "0.5", "-o", str(out), "--dry-run"]
    assert run_app([*words, "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"] == "prune" and "14 linear layers" in plan["actions"][0]
    assert not out.exists()


def test_layers_alone_mean_structured(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["prune", str(tiny_model), "--layers", "1", *SMALL, "-o", str(out), "--quiet"]
    assert run_app(words) == 0
    assert read_artifact(out).config["num_hidden_layers"] == 1
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "structured" and report["parameters"] < report["original_parameters"]
