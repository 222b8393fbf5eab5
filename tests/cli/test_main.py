"""The command line as scripts and people meet it: words, exit codes, one clear line for a fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infopt.cli.main import run_app

VERBS = ("quantize", "convert", "evaluate", "profile", "serve", "bench", "run", "doctor")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line of the error, nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [x for x in captured.err.splitlines() if x.startswith("infopt: error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["quantize", "--help"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from infopt.cli.main import run_app; code = run_app(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "infopt" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: infopt " in text
    assert "--json" in text


def test_the_screen_of_options_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["--help"]) == 0
    text = capsys.readouterr().out
    assert [verb for verb in VERBS if f"  {verb} " in text] == list(VERBS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["quantize", "--bit", "4"], "--bit"),
        (["quantize", "--bits", "5"], "'5'"),
        (["quantize", "--group-size", "48"], "'48'"),
        (["quantize", "--damp-percent", "7"], "damp_percent"),
        (["evaluate", "--max-ppl-increase", "much"], "max_ppl_increase"),
        (["evaluate", "--max-ppl-increase", "2%"], "--baseline"),
        (["evaluate", "--stride", "0"], "stride"),
        (["bench", "--concurrency", "0"], "concurrency"),
        (["serve", "--port", "70000"], "port"),
        (["serve", "--json", "-"], "--ask"),
        (["bench", "--url", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype"),
        (["evaluate", ""], "MODEL is empty"),
        (["run", "run/demo", "--resume", "--yes"], "contradict"),
        (["quantize", "no/such/model/dir"], "no/such/model/dir"),
        (["convert", "no/such/model"], "--format"),
        (["convert", "x", "--format", "gptq", "--dtype", "float32"], "dense only"),
        (["run", "no-such-recipe.yaml"], "no-such-recipe"),
        (["evaluate", "--json", "no/such/dir/x.json"], "no/such/dir"),
        (["evaluate", "--recipe", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(words) == 2
    assert expected in one_line(capsys)


@pytest.mark.parametrize("verb", ["quantize", "evaluate", "profile"])
def test_a_folder_that_is_no_model_is_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    assert run_app([verb, str(tmp_path)]) == 1
    assert str(tmp_path) in one_line(capsys)


def test_an_unknown_recipe_key_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nsteps:\n  - quantize: {bits: 4, grupsize: 64}\n")
    assert run_app(["run", str(recipe)]) == 2
    line = one_line(capsys)
    assert "'grupsize'" in line
    assert "step 1 (quantize)" in line
    assert "did you mean 'group_size'" in line


def test_nan_weights_are_named_and_nothing_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    words = ["quantize", str(broken), "--method", "rtn", "--output", str(output), "--quiet"]
    assert run_app(words) == 1
    assert "model.layers.1.mlp.up_proj" in one_line(capsys)
    assert not output.exists()


def quantized(tiny_model: Path, folder: Path, *more: str) -> Path:
    words = [
        "quantize",
        str(tiny_model),
        "--method",
        "rtn",
        "--output",
        str(folder),
        "--quiet",
        *more,
    ]
    assert run_app(words) == 0
    return folder


def test_quantize_then_evaluate_as_a_script_would(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = quantized(
        tiny_model, tmp_path / "w8", "--bits", "8", "--json", str(tmp_path / "q.json")
    )
    made = json.loads((tmp_path / "q.json").read_text())
    assert made["bits"] == 8
    assert made["made"]["settings"]["method"] == "rtn"
    assert json.loads((output / "report.json").read_text())["bytes"] == made["bytes"]
    capsys.readouterr()
    words = ["evaluate", str(output), "--baseline", str(tiny_model), "--tokens", "256"]
    assert run_app([*words, "--context", "64", "--json", "-"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["tokens"] > 0
    assert report["perplexity"] == pytest.approx(report["baseline"]["perplexity"], rel=0.05)
    assert 0 <= report["kl_divergence"] < 0.05
    assert 0.5 < report["top1_agreement"] <= 1
    assert "perplexity" in captured.err


def test_the_gate_exits_1_after_showing_the_report(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = quantized(tiny_model, tmp_path / "w2", "--bits", "2")
    capsys.readouterr()
    words = ["evaluate", str(output), "--baseline", str(tiny_model), "--tokens", "256"]
    assert run_app([*words, "--context", "64", "--max-ppl-increase", "0%", "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["delta_nll"] > 0
    assert "infopt: error: " in captured.err


def test_existing_output_is_kept_without_yes(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = quantized(tiny_model, tmp_path / "w4")
    before = (output / "manifest.json").read_bytes()
    capsys.readouterr()
    assert run_app(["quantize", str(tiny_model), "--output", str(output), "--quiet"]) == 2
    assert "--yes" in one_line(capsys)
    assert (output / "manifest.json").read_bytes() == before
    quantized(tiny_model, output, "--yes", "--bits", "8")
    assert (output / "manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    "words",
    [["quantize"], ["evaluate"], ["profile", "--mfu"], ["serve"], ["bench"], ["run", "run/demo"]],
    ids=lambda words: words[0],
)
def test_a_dry_run_says_what_and_does_nothing(
    words: list[str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_model)] if words[0] == "run" else [str(tiny_model)]
    assert run_app([*words, *model, "--dry-run", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["actions"]
    assert plan["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_options_override_the_recipe(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(tiny_model), "--recipe", "quantize/rtn-w4", "--bits", "8"]
    assert run_app([*words, "--output", str(tmp_path / "out"), "--json", "-", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["bits"]) == ("rtn", 8)


def test_an_interrupt_exits_130_without_a_traceback(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import infopt.core.evaluation.evaluate as room

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "evaluate", interrupt)
    assert run_app(["evaluate", str(tiny_model)]) == 130
    assert "interrupted" in one_line(capsys)


def test_output_without_a_terminal_has_no_control_characters(tiny_model: Path) -> None:
    words = ["evaluate", str(tiny_model), "--tokens", "128", "--context", "64"]
    done = subprocess.run(
        [sys.executable, "-m", "infopt.cli.entry", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        check=True,
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert "perplexity" in done.stdout
