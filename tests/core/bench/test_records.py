from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.bench.client import Chunk
from infopt.core.bench.records import Trip, record
from infopt.core.reports.requests import RequestRecord


def text(time: float, count: int | None = None) -> Chunk:
    return Chunk(time, True, count)


def mute(time: float, count: int | None = None, prompt: int | None = None) -> Chunk:
    return Chunk(time, False, count, prompt)


def sampled(sent: float, *chunks: Chunk) -> RequestRecord:
    trip = Trip(0, 0, sent, sent, sent, 8, ended=99.0, chunks=list(chunks))
    return record(trip, counted_by="usage")


def test_a_token_a_chunk() -> None:
    sample = sampled(10.0, text(10.5), text(10.6), text(10.7), mute(10.8, 3, 7))
    assert sample.ttft == 0.5
    assert sample.tpot == pytest.approx(0.1)
    assert sample.e2e == pytest.approx(0.7), "to the last token, not to the usage"
    assert (sample.output_tokens, sample.prompt_tokens, sample.count_source) == (3, 7, "usage")
    assert not sample.guessed


def test_the_role_and_the_finish_stamp_nothing() -> None:
    sample = sampled(0.0, mute(0.1), text(0.9), text(1.0), mute(5.0), mute(5.1, 2))
    assert sample.ttft == 0.9 and sample.tpot == pytest.approx(0.1) and sample.e2e == 1.0


def test_several_tokens_a_chunk_with_running_counts() -> None:
    sample = sampled(0.0, text(1.0, 3), text(1.6, 6), text(1.9, 9))
    assert sample.tokens_at_first == 3
    assert sample.tpot == pytest.approx(0.9 / 6), "not 0.9 / 8: three came with the first chunk"
    assert sample.arrivals == ((1.0, 3.0), (1.6, 3.0), (1.9, 3.0))


def test_text_held_back_counts_with_the_chunk_that_brings_it() -> None:
    """The first token was half a character: the first text holds two tokens."""
    sample = sampled(0.0, mute(0.5, 1), text(0.7, 2), text(0.8, 3))
    assert sample.ttft == 0.7 and sample.tpot == pytest.approx(0.1)


def test_several_tokens_a_chunk_and_nobody_says_how_many() -> None:
    sample = sampled(0.0, text(1.0), text(2.0), mute(2.0, 9))
    assert sample.guessed and sample.count_source == "usage" and sample.output_tokens == 9
    assert sample.tpot == pytest.approx(1.0 / 8)
    assert sum(n for _, n in sample.arrivals) == pytest.approx(9)


def test_two_frames_of_one_read_are_the_first_tokens_together() -> None:
    sample = sampled(0.0, text(1.0), text(1.0), text(1.3))
    assert sample.tokens_at_first == 2 and sample.tpot == pytest.approx(0.3)


@pytest.mark.parametrize(
    "chunks",
    [
        (text(1.0), mute(1.1, 1)),
        (text(1.0), mute(1.5, 30)),
        (text(1.0, 30),),
        (text(1.0), text(1.0)),
    ],
    ids=["one token", "one chunk, usage later", "one chunk with its count", "all in one read"],
)
def test_tpot_is_undefined_and_never_zero(chunks: tuple[Chunk, ...]) -> None:
    assert sampled(0.0, *chunks).tpot is None


@pytest.mark.parametrize("wrong", [None, 0, 2])
def test_missing_and_impossible_usage_falls_back_to_chunks(wrong: int | None) -> None:
    sample = sampled(0.0, text(1.0), text(2.0), text(3.0), mute(3.0, wrong))
    assert sample.count_source == "chunks" and sample.output_tokens == 3 and sample.tpot == 1.0


def test_counts_that_run_backwards_are_not_believed() -> None:
    sample = sampled(0.0, text(1.0, 5), text(2.0, 3), text(3.0, 9))
    assert sample.output_tokens == 9 and sample.guessed and sample.tokens_at_first == 1


@pytest.mark.parametrize("chunks", [(), (mute(0.1), mute(0.2, 4))], ids=["none", "mute"])
def test_no_text_is_a_failure(chunks: tuple[Chunk, ...]) -> None:
    sample = sampled(0.0, *chunks)
    assert sample.error == "the answer held no text" and sample.ttft is None


def test_times_count_from_the_start_of_the_run() -> None:
    trip = Trip(3, 1, 100.0, 100.2, 100.5, 4, ended=102.0, chunks=[text(101.0), text(101.5)])
    found = record(trip, counted_by="usage", origin=100.0)
    assert (found.scheduled, found.released, found.sent) == (0.0, pytest.approx(0.2), 0.5)
    assert (found.first, found.last, found.ended) == (1.0, 1.5, 2.0)
    assert found.ttft == 1.0 and found.lag == 0.5 and found.arrivals == ((1.0, 1.0), (1.5, 1.0))


def test_reasoning_is_no_answer_yet() -> None:
    thought = Chunk(0.5, True, 1, answer=False)
    sample = sampled(0.0, thought, text(0.9, 2), text(1.0, 3))
    assert sample.ttft == 0.5 and sample.ttfot == 0.9
    assert sampled(0.0, thought).ttfot is None, "an answer that is all thought"


ANSWERS = st.lists(
    st.tuples(
        st.floats(0, 1), st.booleans(), st.one_of(st.none(), st.integers(0, 40)), st.booleans()
    ),
    max_size=20,
)


@given(ANSWERS, st.one_of(st.none(), st.integers(0, 200)))
def test_every_token_arrives_once_whatever_is_said(
    frames: list[tuple[float, bool, int | None, bool]], total: int | None
) -> None:
    """Whatever a server says of its tokens: they add up, in order, and no time is negative."""
    time, chunks = 1.0, []
    for gap, content, count, answer in frames:
        time += round(gap, 2)
        chunks.append(Chunk(time, content, count, None, answer))
    chunks += [] if total is None else [mute(time + 0.1, total)]
    found = sampled(1.0, *chunks)
    contents = [chunk for chunk in chunks if chunk.content]
    assert sum(tokens for _, tokens in found.arrivals) == found.output_tokens >= len(contents)
    assert all(tokens >= 1 for _, tokens in found.arrivals)
    times = [time for time, _ in found.arrivals]
    assert all(earlier < later for earlier, later in pairwise(times))
    if contents:
        assert found.tokens_at_first == found.arrivals[0][1]
        assert found.tpot is None or found.tpot > 0
        assert found.first == times[0] and found.last == times[-1]
        assert found.ttfot is None or found.ttft is None or found.ttfot >= found.ttft
    else:
        assert not found.completed
