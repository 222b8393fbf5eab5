import json
from pathlib import Path

import pytest

from infopt.core.bench.trace import TraceRow, read_trace
from infopt.core.errors import UsageError

GOOD = {"timestamp": 1000, "input_length": 7, "output_length": 3, "hash_ids": [1, 2]}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_times_count_from_the_first_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, {**GOOD, "timestamp": 3500}, "", GOOD)
    assert read_trace(path) == [TraceRow(0.0, 7, 3), TraceRow(2.5, 7, 3)]
    assert read_trace(path, speedup=5.0)[1].time == 0.5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{nonsense", "line 2 is not JSON"),
        ("[1]", "line 2 is no object"),
        ({**GOOD, "timestamp": "now"}, "line 2: timestamp is 'now'"),
        ({**GOOD, "timestamp": -1}, "timestamp is -1"),
        ({**GOOD, "input_length": 0}, "input_length is 0"),
        ({**GOOD, "output_length": True}, "output_length is True"),
        ({"timestamp": 1, "input_length": 2}, "output_length is None"),
    ],
    ids=str,
)
def test_what_is_no_trace_is_told_by_its_line(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("[", r"\[")):
        read_trace(written(tmp_path, GOOD, row))


def test_no_trace_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no request"):
        read_trace(written(tmp_path, ""))
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
