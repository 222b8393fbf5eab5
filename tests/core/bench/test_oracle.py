"""Each way in which load generators are known to measure wrongly, against a scripted server."""

import json
from typing import Any

import numpy as np
import pytest

from infopt.core.bench.bench import bench
from infopt.core.bench.client import Chunk
from infopt.core.bench.http_client import HttpClient
from infopt.core.bench.metrics import values
from infopt.core.bench.records import Trip, record
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.requests import RequestRecord

Ran = tuple[BenchReport, list[RequestRecord]]


def run(server: Any, **settings: Any) -> Ran:
    """One request, or as many as are asked for, without warm-up."""
    told = {"requests": 1, "concurrency": 1, "prompt_tokens": 4, "output_tokens": 5, "warmup": 0}
    if "request_rate" in settings:
        del told["concurrency"]
    asked = BenchSettings(**(told | settings))
    records: list[RequestRecord] = []
    client = HttpClient(server.url, endpoint="chat" if asked.chat else "completions")
    report = bench(client, asked, target=server.url, keep=records.extend)
    return report, records


def scripted(mock: Any, script: list[float | bytes]) -> Any:
    """The probe is answered plainly, and every other request by the script."""
    plain = [mock.frame("x", finish="stop"), mock.DONE]
    return mock(lambda body: plain if body["max_tokens"] == 2 else script)


def test_1_a_role_alone_is_no_token(mock: Any) -> None:
    script = [
        mock.delta(role="assistant", content=""), 0.15, mock.delta(content="a"), 0.05,
        mock.delta(content="b"), 0.05, mock.delta(finish="stop"), mock.DONE,
    ]  # fmt: skip
    report, (found,) = run(scripted(mock, script), endpoint="chat")
    assert found.ttft is not None and found.ttft >= 0.15
    assert found.output_tokens == 2 and report.endpoint is None
    (first, _), (second, _) = found.arrivals
    assert found.tpot == pytest.approx(second - first), "the finish is no token either"
    assert found.e2e is not None and found.e2e < found.ended - found.scheduled - 0.03


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_2_thought_comes_before_the_answer(mock: Any, key: str) -> None:
    script = [
        mock.delta(role="assistant", content=None), mock.delta(**{key: "hm"}), 0.1,
        mock.delta(content=None, **{key: "so"}), 0.1, mock.delta(content="Yes"),
        mock.delta(finish="stop"), mock.DONE,
    ]  # fmt: skip
    report, (found,) = run(scripted(mock, script), endpoint="chat")
    assert found.ttft is not None and found.ttfot is not None
    assert found.ttfot - found.ttft >= 0.15 and found.output_tokens == 3
    assert report.ttft_s is not None and report.ttfot_s is not None
    assert report.ttft_s.p50 < report.ttfot_s.p50


def test_2_a_call_of_a_tool_is_an_answer(mock: Any) -> None:
    def call(**function: str) -> bytes:
        return mock.delta(tool_calls=[{"index": 0, "function": function}])

    script = [
        mock.delta(role="assistant"), mock.delta(reasoning_content="hm"), 0.1, call(name="f"),
        0.05, call(arguments="{}"), mock.delta(finish="tool_calls"), mock.DONE,
    ]  # fmt: skip
    server = scripted(mock, script)
    _, (found,) = run(server, workload="tools")
    assert found.ttft is not None and found.ttfot is not None
    assert found.ttfot - found.ttft >= 0.05 and found.output_tokens == 3
    body = server.bodies[-1]
    assert body["tool_choice"] == "auto" and body["tools"] and body["messages"]


def test_3_several_tokens_a_chunk_the_first_among_them(mock: Any) -> None:
    script: list[float | bytes] = []
    for count in (4, 8, 12):
        script += [mock.frame("t" * 4, usage=mock.usage(count)), 0.08]
    _, (found,) = run(scripted(mock, [*script, mock.DONE]), output_tokens=12)
    assert found.tokens_at_first == 4 and found.output_tokens == 12
    spread = found.arrivals[-1][0] - found.arrivals[0][0]
    assert found.tpot == pytest.approx(spread / 8), "for eight, not for eleven"


@pytest.mark.parametrize(
    ("usage", "count", "source"),
    [
        ([], 3, "chunks"),
        ([{"completion_tokens": 0, "prompt_tokens": 4}], 3, "chunks"),
        ([{"completion_tokens": 2, "prompt_tokens": 4}], 3, "chunks"),
        ([{"completion_tokens": True}], 3, "chunks"),
        ([{"completion_tokens": "3"}], 3, "chunks"),
        ([{"completion_tokens": 7, "prompt_tokens": 4}], 7, "usage"),
    ],
    ids=["missing", "zero", "fewer than chunks", "a boolean", "a word", "late and right"],
)
def test_4_usage_that_is_missing_late_or_wrong(
    mock: Any, usage: list[dict[str, Any]], count: int, source: str
) -> None:
    end = [mock.frame(None, usage=said) for said in usage]
    script = [mock.frame("a"), 0.02, mock.frame("b"), 0.02, mock.frame("c", finish="length"), 0.1]
    report, (found,) = run(scripted(mock, [*script, *end, mock.DONE]))
    assert (found.output_tokens, found.count_source) == (count, source)
    assert len(found.arrivals) == 3, "usage that comes late stamps no token"
    assert found.e2e == pytest.approx(found.arrivals[-1][0] - found.scheduled), "nor the end"
    assert any("without a usable token count" in w for w in report.warnings) == (source == "chunks")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (b'data: {"error": {"message": "no blocks left"}}\n\n', "in mid-stream: no blocks left"),
        (b"", "the stream ended before the answer did"),
    ],
    ids=["an error under 200", "cut off"],
)
def test_5_what_breaks_off_is_a_failure(mock: Any, broken: bytes, said: str) -> None:
    good = [mock.frame("a"), 0.01, mock.frame("b", finish="stop"), mock.DONE]
    calls: list[int] = []

    def script(body: dict[str, Any]) -> Any:
        calls.append(1)
        return [mock.frame("a"), broken] if len(calls) % 2 else good  # the first is the probe

    def answer(body: dict[str, Any]) -> Any:
        return good if body["max_tokens"] == 2 else script(body)

    report, records = run(mock(answer), requests=4)
    assert (report.completed, report.failed) == (2, 2)
    assert all(said in error for error in report.errors)
    assert [record.completed for record in records] == [False, True, False, True]
    assert report.output_tokens == 4, "tokens of failures are no throughput"
    assert report.with_failures["ttft_s"].infinite == ("p50", "p90", "p95", "p99")
    assert not report.valid and any("2 of 4 requests failed" in r for r in report.invalid_reasons)


def test_6_a_wait_in_our_own_queue_counts_in_vllm_s_numbers() -> None:
    """vllm#54101: 500 ms a request (508 measured), 10 a second, 8 of them, one at a time."""
    service, free = 0.508, 0.0
    records = []
    for n in range(8):
        due = n / 10
        sent = max(due, free)
        free = sent + service
        chunks = [Chunk(free, True, 1)]
        trip = Trip(n, 0, due, sent, sent, 1, ended=free, chunks=chunks)
        records.append(record(trip, counted_by="usage"))
    from_schedule = np.percentile(values(records, "e2e"), 99)
    from_sending = np.percentile([r.last - r.sent for r in records if r.last is not None], 99)
    assert from_schedule == pytest.approx(3.33, abs=0.01)
    assert from_sending == pytest.approx(0.508)


def test_6_the_same_through_a_server_a_tenth_as_long(mock: Any) -> None:
    script = [0.05, mock.frame("a", finish="length", usage=mock.usage(1)), mock.DONE]
    server = scripted(mock, script)
    report, records = run(
        server, requests=8, request_rate=100.0, arrival="constant", max_concurrency=1,
        output_tokens=1,
    )  # fmt: skip
    assert server.most_in_flight == 1 and report.completed == 8
    assert report.e2e_s is not None and report.lag_s is not None
    # Each answer takes 50 ms at least and is due 10 ms after the one before: bounds that a slow
    # machine cannot break.
    for number, one in enumerate(sorted(records, key=lambda found: found.scheduled)):
        assert one.e2e is not None and one.e2e >= 0.05 * (number + 1) - 0.01 * number - 0.005
        assert one.lag >= 0.04 * number - 0.005
    assert report.e2e_s.max == max(one.e2e for one in records if one.e2e is not None)
    assert report.e2e_s.p99 > 0.3 and report.lag_s.p99 > 0.25
    assert not any("sent" in reason for reason in report.invalid_reasons), "the bound is ours"


def test_7_one_token_alone_has_no_tpot(mock: Any) -> None:
    script = [mock.frame("a", finish="length", usage=mock.usage(1)), mock.DONE]
    report, (found,) = run(scripted(mock, script), slo="tpot=1us", output_tokens=1)
    assert found.tpot is None and report.tpot_s is None
    assert report.attainment == 1.0 and report.good_without_tpot == 1
    assert any("1 requests have no TPOT" in note for note in report.notes)


def test_8_characters_and_frames_cut_anywhere(mock: Any) -> None:
    stream = b"".join(
        b"data: " + json.dumps({"choices": [{"text": word}]}, ensure_ascii=False).encode() + b"\n\n"
        for word in ("ä", "水", "🙂")
    )
    stream += mock.frame("!", finish="stop", usage=mock.usage(4)) + mock.DONE
    for size in (1, 7, len(stream)):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        script = [act for piece in pieces for act in (piece, 0.001)]
        _, (found,) = run(scripted(mock, script))
        assert found.completed and found.output_tokens == 4
    assert len(found.arrivals) == 1 and found.tpot is None, "one read, one time"


def test_9_comments_keep_the_connection_and_stamp_nothing(mock: Any) -> None:
    script = [b": ping\n\n", 0.1, b": ping\n\n", mock.frame("a"), 0.02, b":\n\n"]
    script += [mock.frame("b", finish="stop"), mock.DONE]
    _, (found,) = run(scripted(mock, script))
    assert found.ttft is not None and found.ttft >= 0.1 and found.output_tokens == 2


def test_10_frames_of_100_kb_come_whole_and_in_time(mock: Any) -> None:
    script: list[float | bytes] = []
    for count in range(1, 21):
        script += [mock.frame("x" * 100_000, usage=mock.usage(count)), 0.005]
    _, (found,) = run(scripted(mock, [*script, mock.DONE]), output_tokens=20)
    assert found.output_tokens == 20 and len(found.arrivals) == 20
    assert found.tpot is not None and found.tpot < 0.1
