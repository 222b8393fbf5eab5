import json
import time
from pathlib import Path
from typing import Any

import pytest

from infopt.core.bench.bench import bench
from infopt.core.bench.http_client import HttpClient
from infopt.core.errors import EngineError, UsageError
from infopt.core.progress import Progress
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import BenchReport
from infopt.core.reports.bench_sections import bench_sections


def run(server: Any, **settings: Any) -> BenchReport:
    values = {"requests": 4, "prompt_tokens": 4, "output_tokens": 3, **settings}
    if not {"request_rate", "sweep", "trace", "find_capacity"} & set(settings):
        values.setdefault("concurrency", 2)
    if "trace" in settings:
        del values["prompt_tokens"], values["output_tokens"]
    asked = BenchSettings(**values)
    client = HttpClient(server.url, endpoint="chat" if asked.chat else "completions")
    return bench(client, asked, target=server.url)


def steady(mock: Any, *, first: float, each: float, tokens: int) -> Any:
    """An answer with known times."""

    def script(body: dict[str, Any]) -> list[float | bytes]:
        frames: list[float | bytes] = [first]
        for n in range(1, tokens + 1):
            frames += [mock.frame("t", usage=mock.usage(n)), each]
        return [*frames, mock.frame(None, usage=mock.usage(tokens)), mock.DONE]

    return script


def test_known_times(mock: Any) -> None:
    report = run(mock(steady(mock, first=0.1, each=0.05, tokens=3)))
    assert (report.completed, report.failed, report.errors) == (4, 0, {})
    assert report.ttft_s is not None and report.tpot_s is not None and report.e2e_s is not None
    assert report.ttft_s.p50 >= 0.1 and report.ttft_s.min < 0.2
    assert report.tpot_s.p50 >= 0.045 and report.tpot_s.min < 0.1
    assert report.e2e_s.p50 >= 0.195 and report.e2e_s.min < 0.4
    assert (report.prompt_tokens, report.output_tokens) == (16, 12)
    assert 0.5 <= report.duration_s < 2.0, "two rounds of two at 0.25 s each"
    assert report.output_tokens_per_s == pytest.approx(12 / report.duration_s)
    assert report.total_tokens_per_s == pytest.approx(28 / report.duration_s)
    assert report.steady_output_tokens_per_s is not None
    assert report.token_count_source == "usage" and report.warnings == ()


def test_every_number_has_its_origin(mock: Any) -> None:
    report = run(mock(steady(mock, first=0.0, each=0.01, tokens=3)))
    head = {"command", "model", "provenance", "warnings", "made", "schema_version"}
    words = {"target", "token_count_source", "engine_command", "load", "workload", "endpoint"}
    words |= {"files", "notes", "invalid_reasons", "stopped_early"}
    assert set(report.provenance) == set(BenchReport.model_fields) - head - words
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_concurrency_and_distinct_prompts(mock: Any) -> None:
    server = mock(steady(mock, first=0.02, each=0.0, tokens=3))
    run(server, requests=9, concurrency=3, warmup=2)
    assert server.most_in_flight == 3
    load = server.bodies[1:]  # without the client's probe
    assert len(load) == 11
    assert len({tuple(body["prompt"]) for body in load}) == 11


def test_the_warmup_is_not_counted(mock: Any) -> None:
    calls: list[int] = []

    def script(body: dict[str, Any]) -> Any:
        calls.append(1)
        slow = 1.0 if len(calls) == 2 else 0.0  # the probe is the first
        return [slow, mock.frame("a"), mock.frame("b"), mock.frame("c", finish="length"), mock.DONE]

    report = run(mock(script), warmup=1)
    assert report.requests == report.completed == 4
    assert report.ttft_s is not None and report.ttft_s.max < 1.0


def test_one_token_outputs_have_no_tpot(mock: Any) -> None:
    report = run(mock(steady(mock, first=0.0, each=0.0, tokens=1)), output_tokens=1)
    assert report.tpot_s is None and report.ttft_s is not None and report.output_tokens == 4


def test_failures_are_counted_by_their_reason(mock: Any) -> None:
    calls: list[int] = []

    def script(body: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) > 2 and len(calls) % 2:
            return [mock.frame("a"), b'data: {"error": {"message": "pool is full"}}\n\n']
        return [mock.frame("abc", finish="length", usage=mock.usage(3)), mock.DONE]

    report = run(mock(script), requests=6, concurrency=1, warmup=0)
    assert report.completed + report.failed == report.requests == 6
    assert report.errors == {"the server failed in mid-stream: pool is full": report.failed}
    assert report.failed == 3 and report.output_tokens == 9
    assert any("in no percentile but" in warning for warning in report.warnings)


def test_none_completed(mock: Any) -> None:
    calls: list[int] = []

    def script(body: dict[str, Any]) -> Any:
        calls.append(1)
        return [mock.frame("a", finish="stop"), mock.DONE] if len(calls) == 1 else [b""]

    with pytest.raises(
        EngineError, match="none of 4 requests completed; 4 times: the stream ended"
    ):
        run(mock(script), warmup=0)


def test_a_dead_target_is_told_at_once() -> None:
    started = time.perf_counter()
    with pytest.raises(EngineError, match="no server answers"):
        bench(HttpClient("http://127.0.0.1:9"), BenchSettings(), target="x")
    assert time.perf_counter() - started < 5


def test_a_silent_server_times_out(mock: Any) -> None:
    def script(body: dict[str, Any]) -> Any:
        probe = body["max_tokens"] == 2
        return [mock.frame("a", finish="stop"), mock.DONE] if probe else [mock.frame("a"), 60.0]

    with pytest.raises(EngineError, match=r"no whole answer within 0\.2 s"):
        run(mock(script), timeout=0.2, warmup=0)


def test_a_server_that_never_answers_at_all(mock: Any) -> None:
    with pytest.raises(EngineError, match=r"gave no answer within 0\.2 s"):
        run(mock(lambda body: [60.0]), timeout=0.2)


def test_answers_cut_short_are_told(mock: Any) -> None:
    report = run(mock(steady(mock, first=0.0, each=0.0, tokens=2)), output_tokens=50)
    assert any(
        "4 answers ended early: 2 tokens in the mean, 50 asked" in w for w in report.warnings
    )


def test_missing_usage_is_told(mock: Any) -> None:
    frames = [mock.frame(c) for c in "abc"]
    report = run(mock(lambda body: [*frames, mock.DONE]))
    assert report.token_count_source == "chunks" and report.output_tokens == 12
    assert any("without a usable token count" in warning for warning in report.warnings)


def test_lengths_beyond_the_model(mock: Any) -> None:
    server = mock(steady(mock, first=0.0, each=0.0, tokens=3), max_model_len=10)
    with pytest.raises(UsageError, match=r"8 prompt and 3 output tokens exceed .* 10"):
        run(server, prompt_tokens=8)


def test_progress(mock: Any) -> None:
    seen: list[Progress] = []
    server = mock(steady(mock, first=0.0, each=0.0, tokens=3))
    settings = BenchSettings(requests=3, concurrency=2, prompt_tokens=4, output_tokens=3)
    bench(HttpClient(server.url), settings, target="x", progress=seen.append)
    assert [(p.done, p.total) for p in seen if p.stage == "benching"] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("fault", [EngineError("the screen is gone"), OSError("a pipe broke")])
def test_a_fault_of_ours_comes_without_its_group(mock: Any, fault: Exception) -> None:
    def progress(_: Progress) -> None:
        raise fault

    server = mock(steady(mock, first=0.0, each=0.0, tokens=3))
    expected = type(fault) if isinstance(fault, EngineError) else ExceptionGroup
    with pytest.raises(expected) as caught:
        bench(HttpClient(server.url), BenchSettings(requests=2), target="x", progress=progress)
    assert caught.value is fault or fault in caught.value.exceptions


def test_an_open_loop_keeps_its_times_whatever_the_server_does(mock: Any) -> None:
    """Ten a second, each taking half a second: five are in flight at once."""
    server = mock(steady(mock, first=0.4, each=0.0, tokens=3))
    report = run(server, requests=12, request_rate=20.0, arrival="constant", warmup=0)
    assert report.load == "open loop" and report.concurrency is None
    assert report.request_rate == 20.0 and server.most_in_flight >= 6
    assert 11 / 20 + 0.4 <= report.duration_s < 12 * 0.4, "one after the other takes that"
    assert report.lag_s is not None and report.lag_s.p50 < 0.4, "none waited for an answer"
    assert report.steady_window_s is not None
    start, end = report.steady_window_s
    assert end - start == pytest.approx(0.8 * 11 / 20, abs=0.02)


def test_a_duration_begins_requests_for_so_long(mock: Any) -> None:
    server = mock(steady(mock, first=0.05, each=0.0, tokens=3))
    report = run(server, requests=None, duration=0.5, warmup=0)
    assert 2 <= report.completed <= 22, "two at once, for half a second"
    assert report.duration_s >= 0.5
    report = run(server, requests=None, duration=0.5, request_rate=30.0, arrival="constant")
    assert report.completed == 15


def test_a_sweep_is_a_level_after_the_other(mock: Any) -> None:
    server = mock(steady(mock, first=0.05, each=0.0, tokens=3))
    report = run(server, sweep="concurrency=1,4", requests=8, warmup=0)
    assert [(x.level, x.concurrency, x.completed) for x in report.levels] == [(0, 1, 8), (1, 4, 8)]
    assert report.levels[1].output_tokens_per_s > 2 * report.levels[0].output_tokens_per_s
    assert report.level == 1 and report.concurrency == 4, "the level with the most throughput"
    assert report.ttft_s == report.levels[1].ttft_s
    prompts = [tuple(body["prompt"]) for body in server.bodies[1:]]
    assert len(set(prompts)) == 16, "no level sees the prompts of another"
    report = run(server, sweep="request-rate=20,40", requests=6, slo="ttft=5s", warmup=0)
    assert [level.request_rate for level in report.levels] == [20.0, 40.0]
    assert report.max_goodput == max(level.goodput or 0 for level in report.levels)


def test_goodput_and_cost(mock: Any) -> None:
    calls: list[int] = []

    def script(body: dict[str, Any]) -> Any:
        calls.append(1)
        slow = 0.2 if len(calls) % 2 else 0.0
        return [slow, mock.frame("abc", finish="length", usage=mock.usage(3)), mock.DONE]

    report = run(
        mock(script), requests=8, concurrency=1, warmup=0, slo="ttft=100ms", price_per_hour=3.6
    )
    assert report.attainment == 0.5 and report.slo == {"ttft": 0.1}
    assert report.goodput == pytest.approx(4 / report.duration_s)
    expected = 3.6 * 1e6 / 3600 / report.output_tokens_per_s
    assert report.cost_per_million_output_tokens == pytest.approx(expected)


def test_the_next_turn_holds_the_answer_before(mock: Any) -> None:
    words = [mock.delta(content="so"), mock.delta(content=" be it"), mock.delta(finish="stop")]
    server = mock(lambda body: [*words, mock.DONE])
    report = run(server, workload="multi-turn", turns=3, requests=7, warmup=0)
    assert report.completed == 7, "the last conversation is cut short"
    talks = [body["messages"] for body in server.bodies[1:]]
    lengths = sorted(len(talk) for talk in talks)
    assert lengths == [1, 1, 1, 3, 3, 5, 5]
    longest = next(talk for talk in talks if len(talk) == 5)
    assert [m["role"] for m in longest] == ["user", "assistant"] * 2 + ["user"]
    assert longest[1]["content"] == longest[3]["content"] == "so be it"
    assert longest[:3] in talks, "the history is what was sent before"


def test_a_turn_that_fails_ends_its_conversation(mock: Any) -> None:
    broken = [mock.delta(content="a"), b""]
    plain = [mock.delta(content="a", finish="stop"), mock.DONE]
    server = mock(lambda body: plain if len(body["messages"]) == 1 else broken)
    report = run(server, workload="multi-turn", turns=3, requests=6, warmup=0, concurrency=1)
    assert (report.completed, report.failed) == (2, 2)


def test_a_trace_is_replayed_at_its_times(mock: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [(0, 5, 2), (400, 9, 3), (1000, 7, 1)]
    path.write_text(
        "\n".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o}) for t, i, o in rows
        )
    )
    server = mock(steady(mock, first=0.0, each=0.0, tokens=1))
    report = run(server, trace=str(path), speedup=2.0, requests=None, warmup=0)
    assert report.load == "trace" and report.completed == 3
    assert 0.5 <= report.duration_s < 1.0, "a second's trace at twice its speed"
    asked = [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies[1:]]
    assert asked == [(5, 2), (9, 3), (7, 1)]


@pytest.mark.slow
def test_the_capacity_of_a_server_of_known_speed(mock: Any) -> None:
    """One at a time, 20 ms each: 50 a second, and fewer where the queue's wait is limited."""
    import asyncio

    turn: list[asyncio.Lock] = []

    async def one_at_a_time(body: dict[str, Any]) -> None:
        if not turn:
            turn.append(asyncio.Lock())
        async with turn[0]:
            await asyncio.sleep(0.02)

    server = mock(lambda body: [mock.frame("a", finish="length", usage=mock.usage(1)), mock.DONE])
    server.before = one_at_a_time
    report = run(
        server, find_capacity=True, request_rate=16.0, slo="ttft=200ms", requests=60,
        output_tokens=1, arrival="constant", warmup=0,
    )  # fmt: skip
    assert report.capacity is not None
    # What the rate is depends on how long this machine sleeps; never can it be above 50 by much.
    found = report.capacity
    assert (found.request_rate or 0) < 62
    assert report.levels[0].request_rate == 16.0
    met = {level.request_rate for level in report.levels if level.met}
    missed = {level.request_rate for level in report.levels if not level.met}
    assert bool(found.contradictions) == bool(met & missed)
    assert not (found.found and found.contradictions)
    stopped = [level for level in report.levels if level.stopped_early]
    assert not any(level.met or level.valid for level in stopped)
    if found.request_rate is not None:
        assert found.request_rate in met and report.request_rate == found.request_rate
        assert report.level in [x.level for x in report.levels if x.met]
        assert report.max_goodput is not None


def test_a_server_s_own_figures_are_read_beside(mock: Any) -> None:
    server = mock(steady(mock, first=0.3, each=0.0, tokens=3))
    server.metrics = lambda: f'infopt:num_requests_running{{m="x"}} {server.in_flight}\n'
    report = run(server, requests=8, concurrency=4, warmup=0)
    assert report.server is not None and report.server.running_max == 4.0
    assert report.server.waiting_max is None and report.warnings == ()
    assert run(server, scrape=False).server is None


def test_a_server_s_own_figures_level_by_level(mock: Any) -> None:
    """The counter goes up once an answer: each level has its own, and those before it none."""
    server = mock(steady(mock, first=0.1, each=0.0, tokens=3))
    server.metrics = lambda: f'infopt:num_preemptions_total{{m="x"}} {len(server.bodies)}\n'
    report = run(server, requests=6, concurrency=None, sweep="concurrency=1,3", warmup=2)
    told = [level.server for level in report.levels]
    assert [None if found is None else found.preemptions for found in told] == [6, 6]
    assert report.server is not None and report.server.preemptions == 12
    text = "".join(str(section) for section in bench_sections(report))
    assert "What the server said of itself" in text


def test_a_server_without_metrics(mock: Any) -> None:
    server = mock(steady(mock, first=0.0, each=0.0, tokens=3))
    report = run(server)
    assert report.server is None and report.warnings == ()
    with pytest.raises(EngineError, match="has no /metrics"):
        run(server, scrape=True)


def test_the_live_view_says_where_the_level_stands(mock: Any) -> None:
    seen: list[Progress] = []
    server = mock(steady(mock, first=0.02, each=0.0, tokens=3))
    settings = BenchSettings(requests=6, concurrency=2, prompt_tokens=4, output_tokens=3)
    bench(HttpClient(server.url), settings, target="x", progress=seen.append)
    note = [p.note for p in seen if p.stage == "benching"][3]
    assert "1 in flight, 4 completed, TTFT p50 " in note and note.endswith(" tokens/s")


def test_a_key_is_sent_and_never_told(mock: Any) -> None:
    def script(body: dict[str, Any]) -> Any:
        if body["max_tokens"] == 2:
            return [mock.frame("a", finish="stop"), mock.DONE]
        return 401, b'{"error": {"message": "wrong key sk-secret-1"}}'

    server = mock(script)
    settings = BenchSettings(requests=2, warmup=0, prompt_tokens=4)
    with pytest.raises(EngineError, match=r"wrong key \*\*\*") as caught:
        bench(HttpClient(server.url, api_key="sk-secret-1"), settings, target="x")
    assert "sk-secret" not in str(caught.value)
    assert all("authorization: bearer sk-secret-1" in head.lower() for head in server.heads)


def test_little_s_law_holds_for_what_is_measured(mock: Any) -> None:
    server = mock(steady(mock, first=0.1, each=0.02, tokens=3))
    report = run(server, requests=40, concurrency=4, warmup=0)
    law = report.littles_law
    assert law is not None and law.holds is True and 3.5 < law.computed <= 4.0
    assert not any("Little" in reason for reason in report.invalid_reasons)
