import csv
import json
from pathlib import Path

import pytest

from infopt.cli.bench_engine import api_key
from infopt.cli.main import run_app
from infopt.core.errors import UsageError

SHORT = ["--prompt-tokens", "8-16", "--output-tokens", "4", "--kv-blocks", "64"]


def read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_what_lies_beside_the_report(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["bench", str(tiny_model), *SHORT, "--sweep", "concurrency=1,2", "--requests", "3"]
    assert run_app([*words, "--output", str(out), "--slo", "ttft=60s", "--quiet"]) == 0
    report = read(out / "report.json")
    assert report["files"] == ["requests.jsonl", "summary.csv", "summary.md"]
    assert report["goodput"] and report["attainment"] == 1.0 and report["max_goodput"]
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [line["level"] for line in lines] == [0, 0, 0, 1, 1, 1]
    with (out / "summary.csv").open() as stream:
        assert [row["concurrency"] for row in csv.DictReader(stream)] == ["1", "2"]
    assert "| 2 at once | 3 of 3 |" in (out / "summary.md").read_text()
    assert run_app([*words, "--output", str(out), "--quiet"]) == 2, "it is not replaced unasked"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--request-rate", "2", "--concurrency", "4"], "say max_concurrency"),
        (["--workload", "multi-turn"], "workload: multi-turn is for a server"),
        (["--workload", "tools", "--dry-run"], "workload: tools is for a server"),
        (["--endpoint", "chat"], "endpoint: chat is for a server"),
        (["--scrape"], "scrape is for a server"),
        (["--slo", "ttft=200"], "a time with its unit"),
        (["--find-capacity"], "needs slo"),
        (["--workload", "shared"], "shared"),
        (["--prompt-tokens", "few"], "prompt_tokens"),
        (["--trace", "no-such-trace.jsonl", "--kv-blocks", "64"], "no-such-trace.jsonl"),
        (["--engine", "llama.cpp"], "llama.cpp serves .gguf files"),
        (["--engine", "llama.cpp", "--dry-run"], "llama.cpp serves .gguf files"),
        (["--url", "http://127.0.0.1:9", "--engine", "vllm"], "two targets"),
        (["--url", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line(
    words: list[str], said: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["bench", str(tiny_model), *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("infopt: error: ")


def test_an_engine_that_is_not_installed_is_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_app(["bench", str(tiny_model), "--engine", "vllm", "--quiet"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "there is no program 'vllm' (pip install vllm)" in line


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_the_plan_says_the_exact_command(
    engine: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(tiny_model), "--engine", engine, "--max-batch-tokens", "256"]
    assert run_app([*words, "--dry-run", "--json", "-", "--quiet"]) == 0
    actions = json.loads(capsys.readouterr().out)["actions"]
    assert actions[0].startswith(f"run {engine} serve {tiny_model}") and " 256" in actions[0]
    assert "16 requests, 4 at once" in actions[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--request-rate", "2.5"], "16 requests, 2.5 a second"),
        (["--sweep", "request-rate=1,2"], "at each level of request-rate=1,2"),
        (["--duration", "9"], "requests for 9 s, 4 at once"),
        (["--find-capacity", "--slo", "ttft=1s"], "highest request rate that keeps ttft=1s"),
        (["--trace", "t.jsonl"], "replay the requests of t.jsonl"),
        (["--prompt-tokens", "8-16"], "8 to 16 tokens in"),
    ],
    ids=str,
)
def test_the_plan_says_the_load(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--url", "http://x", "--dry-run", "--json", "-", "--quiet"]
    assert run_app(["bench", *told, *words]) == 0
    assert said in json.loads(capsys.readouterr().out)["actions"][-1]


@pytest.mark.slow
def test_infopt_s_own_server_is_started_benched_and_stopped(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["bench", str(tiny_model), "--engine", "infopt", *SHORT, "--requests", "6"]
    words += ["--workload", "multi-turn", "--turns", "2", "--concurrency", "2"]
    assert run_app([*words, "--output", str(out), "--quiet"]) == 0
    report = read(out / "report.json")
    assert report["completed"] == 6 and report["endpoint"] == "chat"
    assert "infopt.cli.attended serve" in str(report["engine_command"])
    assert report["server"] is not None and report["token_count_source"] == "usage"


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFOPT_API_KEY", raising=False)
    assert api_key(None) is None
    monkeypatch.setenv("INFOPT_API_KEY", " sk-1\n")
    assert api_key(None) == "sk-1"
    monkeypatch.setenv("OTHER", "sk-2")
    assert api_key("OTHER") == "sk-2"
    monkeypatch.setenv("OTHER", "sk\x7fé")
    with pytest.raises(UsageError, match="OTHER holds no API key") as caught:
        api_key("OTHER")
    assert "é" not in str(caught.value)
