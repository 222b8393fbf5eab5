"""`infopt convert` as scripts and people meet it."""

import json
from pathlib import Path

import pytest
import yaml

from infopt.cli.main import run_app
from infopt.core.artifact.read import read_artifact

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "checkpoints"
SOURCE = str(CHECKPOINTS / "ct-w4a16")


def test_the_report_is_json_alone_and_lies_beside_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["convert", SOURCE, "--format", "awq", "--output", str(out), "--json", "-"]
    assert run_app(words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["command"] == "convert" and report["exact"] is True and report["layers"] == 14
    assert report["made"]["settings"] == {"format": "awq", "dense_dtype": "auto"}
    assert "bit by bit" in captured.err
    kept = json.loads((out / "report.json").read_text())
    assert kept["bytes"] == report["bytes"]
    assert run_app(words) == 2, "it is there already"
    assert "exists already" in capsys.readouterr().err
    assert run_app([*words, "--yes", "--quiet"]) == 0


def test_a_refusal_is_one_line_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for more in ([], ["--dry-run"]):
        words = ["convert", SOURCE, "--format", "bitsandbytes", "--output", str(out), *more]
        assert run_app(words) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "bitsandbytes has NF4, and symmetric 8-bit integers" in captured.err
        assert not out.exists()


def test_a_dry_run_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["convert", SOURCE, "--format", "dense", "--dtype", "float32", "-o", str(out)]
    assert run_app([*words, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"] == "convert" and "dense float32" in plan["actions"][0]
    assert not out.exists()
    assert run_app([*words, "--quiet"]) == 0
    assert read_artifact(out).config["dtype"] == "float32"


def test_a_recipe_may_convert_what_it_quantized(tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    steps = [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 32, "output": "q"}},
        {"convert": {"format": "compressed-tensors", "output": "ct"}},
        {"evaluate": {"tokens": 256, "context": 64, "baseline": "q"}},
    ]
    recipe.write_text(yaml.safe_dump({"name": "r", "model": str(tiny_model), "steps": steps}))
    out = tmp_path / "out"
    words = ["run", str(recipe), "--output", str(out), "--quiet"]
    assert run_app(words) == 0
    report = json.loads((out / "report.json").read_text())
    made = [step["report"] for step in report["steps"]]
    assert made[1]["source_format"] == "gptq" and made[1]["exact"] is True
    assert made[2]["kl_divergence"] == 0.0, "the same weights compute the same"
    assert run_app([*words, "--resume"]) == 0
    again = json.loads((out / "report.json").read_text())
    assert again["steps"][1]["report"]["made"] == made[1]["made"]
