import time
from typing import Any

import pytest

from infopt.core.bench.bench import bench
from infopt.core.bench.http_client import HttpClient
from infopt.core.errors import EngineError, UsageError
from infopt.core.progress import Progress
from infopt.core.recipe.bench import BenchSettings
from infopt.core.reports.bench import BenchReport


def run(server: Any, **settings: Any) -> BenchReport:
    values = {"requests": 4, "concurrency": 2, "prompt_tokens": 4, "output_tokens": 3, **settings}
    return bench(HttpClient(server.url), BenchSettings(**values), target=server.url)


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
    assert 0.5 <= report.duration_s < 1.0, "two rounds of two at 0.25 s each"
    assert report.output_tokens_per_s == pytest.approx(12 / report.duration_s)
    assert report.total_tokens_per_s == pytest.approx(28 / report.duration_s)
    assert report.steady_output_tokens_per_s is not None
    assert report.token_count_source == "usage" and report.warnings == ()


def test_every_number_has_its_origin(mock: Any) -> None:
    report = run(mock(steady(mock, first=0.0, each=0.01, tokens=3)))
    head = {"command", "model", "provenance", "warnings", "made", "schema_version"}
    words = {"target", "token_count_source"}
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
        slow = 0.3 if len(calls) == 2 else 0.0  # the probe is the first
        return [slow, mock.frame("a"), mock.frame("b"), mock.frame("c", finish="length"), mock.DONE]

    report = run(mock(script), warmup=1)
    assert report.requests == report.completed == 4
    assert report.ttft_s is not None and report.ttft_s.max < 0.3


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
    assert any("in no percentile" in warning for warning in report.warnings)


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
