"""`infopt bench` with its subcommands, as scripts and people meet them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infopt.cli import bench_rounds
from infopt.cli.main import run_app
from infopt.core.reports.requests import RequestRecord, write_requests


def bench_folder(folder: Path, slower: float = 1.0, *, seed: int = 0, **more: Any) -> Path:
    """What a bench of 300 requests would have written."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records, now = [], 0.0
    for index in range(300):
        first = 0.1 * slower * float(np.exp(0.1 * generator.standard_normal()))
        times = [now + first + 0.02 * slower * n for n in range(3)]
        records.append(
            RequestRecord(
                index=index,
                scheduled=now,
                sent=now,
                first=times[0],
                first_output=times[0],
                last=times[-1],
                ended=times[-1],
                output_tokens=3,
                tokens_at_first=1,
                arrivals=tuple((time, 1.0) for time in times),
            )
        )
        now += (times[-1] - now) / 4
    report = {
        "command": "bench",
        "completed": 300,
        "failed": 0,
        "valid": True,
        "ttft_s": {"p50": 0.1 * slower, "p95": 0.12 * slower},
        "output_tokens_per_s": 80.0 / slower,
        "made": {"settings": {"requests": 300, "seed": 0}, "created": ""},
        **more,
    }
    (folder / "report.json").write_text(json.dumps(report))
    write_requests(folder / "requests.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("sides")
    return str(bench_folder(root / "a")), str(bench_folder(root / "b", 1.5, seed=1))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [x for x in captured.err.splitlines() if x.startswith("infopt: error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


def test_help_of_bench_has_its_options_and_its_subcommands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_app(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: infopt bench [OPTIONS] [MODEL]" in " ".join(text.split())
    assert "--concurrency" in text
    _, _, commands = text.partition("Commands:")
    named = [line.split()[0] for line in commands.splitlines() if line]
    assert named == ["compare", "check", "kernels"]


@pytest.mark.parametrize("command", ["compare", "check", "kernels"])
def test_each_subcommand_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: infopt bench {command} " in text
    assert "Example: infopt bench" in text and "--json" in text and "Exit codes" in text


def test_subcommands_import_nothing_heavy(sides: tuple[str, str]) -> None:
    code = (
        "import sys; from infopt.cli.main import run_app; code = run_app(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'safetensors', 'fastapi'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    for words in (
        ["compare", *sides, "--resamples", "200"],
        ["check", sides[0], "--max", "ttft.p95=1s"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "bench", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_loop_is_listed_in_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["--help"]) == 0
    text = capsys.readouterr().out.partition("Commands:")[2]
    listed = [line.split()[0] for line in text.splitlines() if line[2:3].strip()]
    assert listed[-4:] == ["serve", "bench", "run", "doctor"]


def test_the_first_word_alone_names_a_subcommand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is called like one is given as a path, or after --."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare").mkdir()
    for words in (["./compare"], ["--", "compare"], ["--requests", "4", "compare"]):
        assert run_app(["bench", *words]) == 1
        assert "compare" in one_line(capsys)  # a folder without a model
    assert run_app(["bench", "compare"]) == 2
    assert "two sides are wanted" in one_line(capsys)


def test_a_mistyped_subcommand_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", "compar", "a", "b"]) == 2
    assert "Did you mean 'bench compare'?" in one_line(capsys)
    assert run_app(["bench", "zzz", "a"]) == 2
    assert "Did you mean" not in one_line(capsys)


def test_a_comparison_is_shown_kept_and_told_as_json(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "compare", *sides, "--json", "-", "--output", str(tmp_path / "out")]
    assert run_app(words) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["verdict"] == "worse" and report["command"] == "compare"
    found = {metric["key"]: metric for metric in report["metrics"]}
    ttft = found["ttft_s.p50"]
    assert ttft["verdict"] == "worse" and ttft["low"] < 1.5 < ttft["high"]
    assert report["made"]["settings"]["a"] == [sides[0]]
    assert "ttft p50" in captured.err and "worse" in captured.err
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    assert kept["metrics"] == report["metrics"]
    assert "Ratios of B to A" in (tmp_path / "out" / "report.html").read_text()
    assert run_app(words) == 2
    assert "--yes" in one_line(capsys)


def test_a_regression_fails_only_where_it_is_to(
    sides: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "compare", "--resamples", "200", "--quiet"]
    assert run_app([*words, *sides, "--fail-on-regression"]) == 1
    assert "ttft_s.p50" in one_line(capsys)
    assert run_app([*words, *sides]) == 0
    assert run_app([*words, *reversed(sides), "--fail-on-regression"]) == 0
    assert run_app([*words, *sides, "--fail-on-regression", "--threshold", "70%"]) == 0


def test_several_runs_of_each_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in "ab":
        for number in range(4):
            bench_folder(tmp_path / side / f"{number}", seed=10 * number + ord(side))
    words = ["bench", "compare", "--resamples", "200", "--json", "-", "--quiet"]
    assert run_app([*words, str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    whole = json.loads(capsys.readouterr().out)
    named = [f"--{side}={tmp_path / side / str(n)}" for n in range(4) for side in "ab"]
    assert run_app([*words, *named]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == whole["metrics"]
    assert whole["runs_drawn"] and len(whole["a"]) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "{a}"], "two sides are wanted"),
        (["compare", "{a}", "{a}"], "is on both sides"),
        (["compare", "{a}", "{b}", "--", "--requests", "4"], "without --run"),
        (["compare", "{a}", "{b}", "{a}"], "two sides are wanted"),
        (["compare", "{a}", "{b}", "--a", "{a}"], "named twice"),
        (["compare", "{a}", "no/such"], "no/such"),
        (["compare", "{a}", "{b}", "--threshold", "5"], "5% is written with its sign"),
        (["compare", "{a}", "{b}", "--threshold", "much"], "--threshold 'much'"),
        (["compare", "{a}", "{b}", "--rounds", "3"], "--rounds is for --run"),
        (["compare", "{a}", "{b}", "--level", "3"], "no request of level 3"),
        (["compare", "{a}", "{b}", "--seed", "-1"], "--seed -1"),
        (["compare", "{a}", "{b}", "--resamples", "3"], "--resamples"),
        (["compare", "{a}", "{b}", "--json", "no/such/x.json"], "no/such"),
        (["compare", "--run", "x"], "two targets"),
        (["compare", "--run", "x", "y"], "--output"),
        (["compare", "--run", "x", "y", "--a", "{a}"], "runs that were made"),
        (["compare", "--run", "x", "y", "-o", "{o}", "--", "--json=-"], "--json is not for"),
        (["check", "{a}"], "nothing to check"),
        (["check", "{a}", "--max", "ttft.p59=1s"], "did you mean"),
        (["check", "{a}", "--max", "ttft.p95"], "no limit"),
        (["check", "no/such", "--max", "ttft.p95=1"], "no/such"),
        (["check", "{a}", "--max-regression", "5%"], "--baseline"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(
    words: list[str],
    expected: str,
    sides: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"a": sides[0], "b": sides[1], "o": str(tmp_path / "out")}
    assert run_app(["bench", *(word.format(**places) for word in words)]) == 2
    assert expected in one_line(capsys)


def test_the_gate_exits_0_1_or_2(
    sides: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "check", sides[0], "--min", "output_tokens_per_s=50", "--json", "-"]
    assert run_app([*words, "--max", "ttft.p95=200ms"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] and "all limits hold" in captured.err
    assert run_app([*words, "--max", "ttft.p95=100ms"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [limit["holds"] for limit in report["limits"]] == [False, True]
    assert report["limits"][0]["margin"] == pytest.approx(-0.2)
    assert "ttft_s.p95" in captured.err and "MISSED" in captured.err
    bad = bench_folder(tmp_path / "bad", valid=False, invalid_reasons=["sent too late"])
    assert run_app(["bench", "check", str(bad), "--max", "ttft.p95=9s"]) == 2
    assert "sent too late" in one_line(capsys)
    base = ["--baseline", sides[0], "--max-regression", "ttft.p50=5%", "--quiet"]
    assert run_app(["bench", "check", sides[1], *base]) == 1
    assert "ttft_s.p50 0.15 > 0.105" in one_line(capsys)
    assert run_app(["bench", "check", sides[0], *base]) == 0


def test_rounds_go_in_turn_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benches themselves are played: what is asked of them, and in which order."""
    asked: list[list[str]] = []

    def play(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command[3:])
        folder = Path(command[command.index("--output") + 1])
        bench_folder(folder, 1.5 if "http://b" in command else 1.0, seed=len(asked))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(bench_rounds.subprocess, "run", play)
    words = ["bench", "compare", "--run", "http://a", "http://b", "--rounds", "2", "--yes"]
    output = tmp_path / "ab"
    more = ["--output", str(output), "--resamples", "200", "--fail-on-regression"]
    assert run_app([*words, *more, "--", "--requests", "300"]) == 1
    assert [command[-1] for command in asked] == ["http://a", "http://b"] * 2
    expected = ["bench", "--requests", "300", "--quiet", "--output", str(output / "a" / "01")]
    assert asked[0] == [*expected, "--yes", "--url", "http://a"]
    report = json.loads((output / "report.json").read_text())
    assert report["a"] == [str(output / "a" / "01"), str(output / "a" / "02")]
    assert report["verdict"] == "worse"


def test_a_bench_that_fails_ends_the_rounds_with_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "compare", "--run", "http://127.0.0.1:9", "http://127.0.0.1:9"]
    assert run_app([*words, "-o", str(tmp_path / "ab"), "--quiet"]) == 1
    assert "the bench of http://127.0.0.1:9 failed: " in one_line(capsys)
    assert run_app([*words, "-o", str(tmp_path / "ab"), "--", "--requests", "0"]) == 2
    assert "requests" in one_line(capsys)
    assert not (tmp_path / "ab" / "report.json").exists()
