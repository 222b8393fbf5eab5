"""`infopt quantize` as scripts and people meet it."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from infopt.cli.main import run_app
from infopt.cli.quantize import output_of
from infopt.cli.quantize import quantize as command
from infopt.cli.screen import Screen
from infopt.cli.verb import Work
from infopt.core.artifact.read import read_artifact
from infopt.core.quantization import mixed
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.schemes import SCHEMES_OF

FEW = ["--samples", "4", "--sequence-length", "32", "--dtype", "float32"]
SHORT = {"qat": ["--steps", "2"], "autoround": ["--iterations", "2"]}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The JSON that a quantization of the tiny model prints, and nothing else."""

    def do(*words: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run_app(["quantize", str(tiny_model), *FEW, *words, "--json", "-"]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return do


def refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    """The one line of an error, with the exit code."""
    capsys.readouterr()
    assert run_app(["quantize", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("infopt: error: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize("method", list(SCHEMES_OF))
def test_the_report_has_what_scripts_read(run: Run, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    report = run("--method", method, *SHORT.get(method, []), "--output", str(out))
    assert report["command"] == "quantize" and report["method"] == method
    assert report["bytes"] == read_artifact(out).weight_bytes
    # Rotated, the tied head comes apart, and here it outweighs all layers.
    assert (report["bytes"] < report["original_bytes"]) == (method != "rotate")
    assert 4 < report["bits_per_weight"] < 10
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 2**20
    assert len(report["layers"]) == 14
    for layer in report["layers"]:
        assert 0 < layer["error"] < 1 and layer["rtn_error"] > 0
        assert layer["name"].startswith("model.layers.") and layer["scheme"]
        assert layer.keys() >= {"bits", "group_size", "damp", "fallback", "seconds", "tokens"}
    assert report["made"]["settings"]["method"] == method
    assert report["made"]["settings"]["scheme"] == report["scheme"]
    kept = json.loads((out / "report.json").read_text())
    assert kept == report
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--scheme", "W4A8-int8", "--group-size", "32"], {"scheme": "W4A8-int8", "group_size": 32}),
    (["--bits", "3", "--asym", "--grid", "minmax"], {"bits": 3, "symmetric": False}),
    (["--method", "smoothquant", "--alpha", "0.5"], {"alpha": 0.5, "scheme": "W8A8-int8"}),
    (["--method", "smoothquant", "--alpha", "search"], {"alpha": "search"}),
    (["--method", "llm-int8", "--threshold", "2"], {"threshold": 2.0}),
    (["--method", "nf4", "--no-double-quant"], {"double_quant": False}),
    (["--method", "fp8", "--fp8", "static"], {"fp8": "static", "format": "compressed-tensors"}),
    (["--method", "awq", "--no-clip", "--rounding", "rtn"], {"clip": False, "rounding": "rtn"}),
    (["--gptaq", "0.25", "--no-act-order"], {"gptaq": 0.25, "act_order": False}),
    (["--no-true-sequential", "--damp-percent", "0.02"], {"damp_percent": 0.02}),
    (["--kv-cache", "fp8"], {"kv_cache": "fp8", "format": "compressed-tensors"}),
    (["--format", "compressed-tensors"], {"format": "compressed-tensors"}),
    (["--target-bits", "3.5", "--mixed-bits", "3,4"], {"mixed_bits": [3, 4], "scheme": "mixed"}),
    (["--max-ppl-increase", "1%"], {"max_ppl_increase": 0.01, "scheme": "mixed"}),
    (["--ignore", "lm_head", "--ignore", "*.o_proj"], {"ignore": ["lm_head", "*.o_proj"]}),
    (["--method", "auto-gptq"], {"method": "gptq"}),
    (["--offload", "disk"], {"offload": "disk"}),
    (["--routed-experts"], {"calibrate_all_experts": False}),
    (["--method", "qat", "--learning-rate", "0.01"], {"learning_rate": 0.01}),
    (["--method", "rotate", "--scheme", "W16A16", "--seed", "7"], {"seed": 7, "format": None}),
]


@pytest.mark.parametrize(("words", "expected"), OPTIONS, ids=lambda v: " ".join(map(str, v)))
def test_every_option_reaches_the_settings(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: dict[str, Any],
) -> None:
    seen: list[Work] = []

    def look(work: Work) -> Any:
        seen.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr("infopt.cli.quantize.plan", look)
    assert run_app(["quantize", str(tiny_model), *words, "--dry-run"]) == 130
    found = seen[0].settings.model_dump(mode="json")
    assert {key: found[key] for key in expected} == expected


def test_the_defaults_that_the_help_names_are_the_defaults() -> None:
    told: dict[str, str] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        option = get_args(parameter.annotation)[1]
        if isinstance(option.show_default, str):
            told[name] = option.show_default
    defaults = QuantizeSettings().model_dump(mode="json")
    widths = ",".join(map(str, defaults["mixed_bits"]))
    assert told["mixed_bits"] == widths
    for name in ("steps", "iterations", "threshold", "damp_percent", "alpha", "grid", "group_size"):
        assert told[name] == str(defaults[name]), name


@pytest.mark.parametrize("method", list(SCHEMES_OF))
def test_a_dry_run_plans_and_writes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = run("--method", method, "--dry-run")
    assert plan["command"] == "quantize" and plan["actions"][0].startswith(f"{method}: 14 ")
    assert plan["memory_bytes"] > 0 and plan["disk_bytes"] > 0
    calibrating = method in ("gptq", "awq", "smoothquant", "autoround", "rotate", "qat")
    assert any("calibration: 4 windows of 32" in line for line in plan["actions"]) == calibrating
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target-bits", "3.5"], "at 3, 4, 8 bits"),
        (["--method", "rotate", "--scheme", "W16A16"], "a dense artifact"),
        (["--method", "fp8"], "fp8 inputs per token"),
        (["--method", "llm-int8", "--threshold", "2"], "outliers from 2"),
        (["--method", "qat", "--steps", "7"], "train 7 steps"),
        (["--analyze", "--mixed-bits", "2,4"], "at 2, 4 bits"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_plan_says_what_is_special(run: Run, words: list[str], told: str) -> None:
    assert any(told in line for line in run(*words, "--dry-run")["actions"])


def test_an_analysis_writes_no_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = run("--analyze", "--mixed-bits", "2,4,8")
    assert list(tmp_path.iterdir()) == []
    assert len(report["sensitivity"]) == 8 * 3 and "layers" not in report
    assert {"unit", "layers", "parameters", "bits", "kl", "delta_nll"} <= set(
        report["sensitivity"][0]
    )
    assert report["allocation"]["target_bits"] == 8.0, "the most, unless another is given"
    assert report["allocation"]["mean_bits"] <= 8.0
    out = tmp_path / "out"
    again = run(
        "--analyze",
        "--method",
        "rtn",
        "--target-bits",
        "3",
        "--mixed-bits",
        "2,4,8",
        "-o",
        str(out),
    )
    assert again["sensitivity"] == report["sensitivity"], "what is measured is the same"
    assert again["allocation"]["target_bits"] == 3.0
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html"}


def test_an_analysis_of_few_bits_needs_no_target(run: Run) -> None:
    report = run("--analyze", "--mixed-bits", "2,3")
    assert {row["bits"] for row in report["sensitivity"]} == {2, 3}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mixed-bits", "3,x", "--target-bits", "3.5"], "'3,x'"),
        (["--mixed-bits", "", "--target-bits", "3.5"], "mixed-bits"),
        (["--mixed-bits", "3,5", "--target-bits", "3.5"], "mixed_bits"),
        (["--mixed-bits", "4", "--target-bits", "4"], "mixed_bits"),
        (["--mixed-bits", "3,4"], "mixed_bits is read by scheme mixed only"),
        (["--target-bits", "9"], "target_bits"),
        (["--target-bits", "2.5"], "target_bits"),
        (["--target-bits", "4", "--max-ppl-increase", "1%"], "two ways"),
        (["--max-ppl-increase", "much"], "max_ppl_increase"),
        (["--scheme", "W4A16", "--bits", "3"], "contradicts bits 3"),
        (["--method", "nf4", "--bits", "8"], "nf4"),
        (["--method", "rtn", "--gptaq", "0.25"], "gptaq"),
        (["--method", "smoothquant", "--alpha", "often"], "alpha"),
        (["--method", "smoothquant", "--alpha", "2"], "alpha"),
        (["--method", "awq", "--scheme", "W8A8-int8"], "smoothquant"),
        (["--method", "gptq", "--scheme", "W5A16"], "W5A16"),
        (["--format", "gguf"], "gguf"),
        (["--kv-cache", "int4"], "int4"),
        (["--ignore", "no.such.layer"], "no.such.layer"),
        (["--group-size", "128"], "128 does not divide"),
        (["--analyze", "--method", "nf4"], "nf4"),
        (["--analyze", "--resume"], "resume"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_words_exit_2(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, [str(tiny_model), *FEW, *words], 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--bits", "3", "--format", "awq"], "awq has integers of 4 bits"),
        (["--method", "nf4", "--format", "compressed-tensors"], "no NF4"),
        (["--method", "fp8", "--fp8", "block"], "128"),
        (["--kv-cache", "int8", "--format", "gptq"], "compressed-tensors has"),
        (["--method", "llm-int8", "--kv-cache", "int8"], "outliers"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry"])
def test_what_a_format_cannot_hold_exits_1(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
    more: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, [str(tiny_model), *FEW, *words, *more], 1)
    assert list(tmp_path.iterdir()) == []


def test_a_bound_that_is_not_kept_exits_1_with_the_numbers(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        mixed, "mean_nll", lambda artifact, *_: 2.0 if artifact.quantization is None else 2.1
    )
    out = tmp_path / "out"
    words = [str(tiny_model), *FEW, "--method", "rtn", "--max-ppl-increase", "2%", "-o", str(out)]
    line = refused(capsys, words, 1)
    assert "+2.00%" in line and "+10.52%" in line
    assert not out.exists()


def work(**values: Any) -> Work:
    settings = QuantizeSettings.model_validate(values)
    model: Any = SimpleNamespace(name="model")
    with Screen(quiet=True) as screen:
        return Work("quantize", model, settings, None, False, False, screen, lambda _: model)


def test_no_two_methods_or_schemes_write_to_one_place_unasked() -> None:
    names: dict[str, list[str]] = {}
    for method, schemes in SCHEMES_OF.items():
        for scheme in schemes:
            target = {"target_bits": 3.5} if scheme == "mixed" else {}
            place = str(output_of(work(method=method, scheme=scheme, **target)))
            names.setdefault(place, []).append(f"{method} {scheme}")
    assert {place: who for place, who in names.items() if len(who) > 1} == {}
    for target in (3.5, 4.5):
        assert str(output_of(work(target_bits=target))) == f"model-gptq-w{target}"
    assert output_of(work(max_ppl_increase="1%")) not in map(Path, names)


def test_the_default_place_is_here(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--method", "rtn"], ["--method", "nf4"]):
        run(*words)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{tiny_model.name}-rtn-w4", f"{tiny_model.name}-nf4"}


def test_interrupted_work_is_told_how_to_go_on(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from infopt.core.quantization import walked

    advance, blocks = walked.quantize_block, []

    def second_fails(*args: Any) -> Any:
        blocks.append(args)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return advance(*args)

    out = tmp_path / "out"
    words = [str(tiny_model), *FEW, "--method", "rtn", "--output", str(out)]
    monkeypatch.setattr(walked, "quantize_block", second_fails)
    assert run_app(["quantize", *words]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(walked, "quantize_block", advance)
    assert "--resume" in refused(capsys, words, 1)
    assert run_app(["quantize", *words, "--resume", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["resumed_blocks"] == 1
