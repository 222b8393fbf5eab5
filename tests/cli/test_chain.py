"""Runs of several steps: what is kept, what is refused, what is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from infopt.cli.main import run_app

EVALUATE = {"evaluate": {"tokens": 256, "context": 64}}


def rtn(bits: int, output: str = "q") -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "bits": bits, "output": output}}


def recipe(folder: Path, model: Path, *steps: object) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "model": str(model), "steps": list(steps)}))
    return file


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_each_step_works_on_what_the_one_before_wrote(tiny_model: Path, tmp_path: Path) -> None:
    file = recipe(
        tmp_path, tiny_model, rtn(8), EVALUATE, {"evaluate": {**EVALUATE["evaluate"], "model": "q"}}
    )
    out = tmp_path / "out"
    assert run_app(["run", str(file), "--output", str(out), "--quiet"]) == 0
    steps = read(out / "report.json")["steps"]
    assert [step["verb"] for step in steps] == ["quantize", "evaluate", "evaluate"]
    assert steps[1]["model"] == steps[2]["model"] == str(out / "q")
    assert steps[1]["report"]["perplexity"] == steps[2]["report"]["perplexity"]


def test_resume_keeps_what_is_done_and_redoes_what_depends_on_a_change(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["run", str(recipe(tmp_path, tiny_model, rtn(8), EVALUATE)), "--output", str(out), "-q"]
    assert run_app(words) == 0
    first = read(out / "report.json")["steps"]
    assert run_app([*words, "--resume"]) == 0
    again = read(out / "report.json")["steps"]
    assert [step["report"]["made"] for step in again] == [step["report"]["made"] for step in first]
    recipe(tmp_path, tiny_model, rtn(2), EVALUATE)
    assert run_app([*words, "--resume"]) == 0
    changed = read(out / "report.json")["steps"]
    assert changed[0]["report"]["bits"] == 2
    assert changed[1]["report"]["perplexity"] != first[1]["report"]["perplexity"]


def test_a_kept_report_that_cannot_be_read_is_made_again(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["run", str(recipe(tmp_path, tiny_model, EVALUATE)), "--output", str(out), "-q"]
    assert run_app(words) == 0
    (out / "01-evaluate.json").write_text('{"x":')
    assert run_app([*words, "--resume"]) == 0
    assert "done again" in capsys.readouterr().err
    assert read(out / "01-evaluate.json")["perplexity"] > 0


def test_a_run_folder_is_not_overwritten_unasked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(tmp_path, tiny_model, EVALUATE)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "report.json").write_text("mine")
    assert run_app(["run", str(file), "--output", str(mine), "--yes"]) == 2
    assert (mine / "report.json").read_text() == "mine"
    out = tmp_path / "out"
    assert run_app(["run", str(file), "--output", str(out), "-q"]) == 0
    assert run_app(["run", str(file), "--output", str(out), "-q"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_app(["run", str(file), "--output", str(out), "-q", "--yes"]) == 0


def test_a_wrong_word_in_a_later_step_is_told_before_the_first(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = {"evaluate": {"baseline": "no/such/baseline"}}
    out = tmp_path / "out"
    file = recipe(tmp_path, tiny_model, rtn(8), late)
    assert run_app(["run", str(file), "--output", str(out)]) == 2
    assert "no/such/baseline" in capsys.readouterr().err
    assert not out.exists()


def test_a_dry_run_knows_what_earlier_steps_will_write(tiny_model: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, tiny_model, rtn(8), {"evaluate": {"model": "q"}})
    assert run_app(["run", str(file), "--dry-run", "-q"]) == 0


def test_a_gate_ends_the_run_after_its_report(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {**EVALUATE["evaluate"], "baseline": str(tiny_model), "max_ppl_increase": 0}
    file = recipe(tmp_path, tiny_model, rtn(2), {"evaluate": gate}, EVALUATE)
    out = tmp_path / "out"
    assert run_app(["run", str(file), "--output", str(out), "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [step["verb"] for step in report["steps"]] == ["quantize", "evaluate"]
    assert read(out / "report.json")["steps"][1]["report"]["delta_nll"] > 0


@pytest.mark.slow
def test_a_server_of_a_run_is_asked_and_benched_and_dies_with_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    serve = {"serve": {"port": 0, "ask": ["Who?"], "kv_blocks": 64, "max_model_len": 256}}
    bench = {"bench": {"requests": 2, "concurrency": 2, "prompt_tokens": 8, "output_tokens": 4}}
    # Long enough to be killed in.
    last = {"evaluate": {"tokens": 40000, "context": 64}}
    file = recipe(tmp_path, tiny_model, serve, bench, last)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "infopt.cli.entry", "run", str(file), "--output", str(out), "-q"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while not (out / "02-bench.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
    served = read(out / "01-serve.json")
    assert served["answers"][0]["completion_tokens"] > 0
    bench_report = read(out / "02-bench.json")
    assert bench_report["target"] == served["url"]
    assert bench_report["completed"] == 2
    for name in bench_report["files"]:
        assert (out / "02-bench" / name).stat().st_size > 0
    assert len((out / "02-bench" / "requests.jsonl").read_text().splitlines()) >= 2
    port = int(served["url"].rsplit(":", 1)[1])
    deadline = time.monotonic() + 30
    while _listens(port):
        assert time.monotonic() < deadline, "the server outlived its run"
        time.sleep(0.2)


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
