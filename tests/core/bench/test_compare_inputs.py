"""What a bench wrote, found and read again; what is none is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from infopt.core.bench.compare_inputs import find_runs, read_report, read_run
from infopt.core.errors import UsageError
from infopt.core.reports.requests import RequestRecord, write_requests


def laid(folder: Path, *levels: int, **more: Any) -> Path:
    """A bench's folder with two requests of each level."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"command": "bench", **more}))
    records = [
        RequestRecord(index=index, level=level, scheduled=0, sent=0, ended=1)
        for level in levels or (0,)
        for index in range(2)
    ]
    write_requests(folder / "requests.jsonl", records)
    return folder


def test_a_folder_or_its_report_is_a_run(tmp_path: Path) -> None:
    folder = laid(tmp_path / "one")
    for path in (folder, folder / "report.json"):
        assert find_runs(path) == [path]
        assert [record.index for record in read_run(path).records] == [0, 1]


def test_a_folder_of_runs_is_all_of_them_in_order(tmp_path: Path) -> None:
    runs = [laid(tmp_path / "side" / name) for name in ("02", "01", "10")]
    assert find_runs(tmp_path / "side") == [runs[1], runs[0], runs[2]]


def test_of_a_sweep_one_level_is_read(tmp_path: Path) -> None:
    folder = laid(tmp_path / "sweep", 0, 1, 2, level=2)
    assert {record.level for record in read_run(folder).records} == {2}
    assert {record.level for record in read_run(folder, 1).records} == {1}
    with pytest.raises(UsageError, match=r"no request of level 7 \(there are: 0, 1, 2\)"):
        read_run(folder, 7)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "no report"), ("{}", "no report")],
)
def test_what_is_no_report_is_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_report(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_what_lacks_its_requests_is_one_line(tmp_path: Path) -> None:
    folder = laid(tmp_path / "one")
    lines = (folder / "requests.jsonl").read_text()
    (folder / "requests.jsonl").write_text(lines + lines)
    with pytest.raises(UsageError, match="has a request twice"):
        read_run(folder)
    (folder / "requests.jsonl").write_text('{"index": "no"}\n')
    with pytest.raises(UsageError, match="line 1: index"):
        read_run(folder)
    (folder / "requests.jsonl").unlink()
    with pytest.raises(UsageError, match="--output"):
        read_run(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no report\.json"):
        find_runs(tmp_path / "empty")
