import math

import pytest

from infopt.core.bench.client import Chunk
from infopt.core.bench.metrics import Failure, Sample, measure, percentiles, steady_rate


def text(time: float, count: int | None = None) -> Chunk:
    return Chunk(time, True, count)


def mute(time: float, count: int | None = None, prompt: int | None = None) -> Chunk:
    return Chunk(time, False, count, prompt)


def sampled(sent: float, *chunks: Chunk) -> Sample:
    sample = measure(sent, chunks)
    assert sample is not None
    return sample


def test_a_token_a_chunk() -> None:
    sample = sampled(10.0, text(10.5), text(10.6), text(10.7), mute(10.8, 3, 7))
    assert sample.ttft == 0.5
    assert sample.tpot == pytest.approx(0.1)
    assert sample.e2e == pytest.approx(0.7), "to the last token, not to the usage"
    assert (sample.tokens, sample.prompt_tokens, sample.counted) == (3, 7, True)
    assert not sample.guessed_first


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
    assert sample.guessed_first and sample.counted and sample.tokens == 9
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
    assert not sample.counted and sample.tokens == 3 and sample.tpot == 1.0


def test_counts_that_run_backwards_are_not_believed() -> None:
    sample = sampled(0.0, text(1.0, 5), text(2.0, 3), text(3.0, 9))
    assert sample.tokens == 9 and sample.guessed_first and sample.tokens_at_first == 1


def test_no_text_is_no_sample() -> None:
    assert measure(0.0, [mute(0.1), mute(0.2, 4)]) is None
    assert measure(0.0, []) is None


def test_percentiles_interpolate_linearly() -> None:
    found = percentiles([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.mean, found.p50, found.min, found.max) == (2.5, 2.5, 1.0, 4.0)
    assert math.isclose(found.p90, 3.7) and math.isclose(found.p99, 3.97)
    assert percentiles([]) is None
    single = percentiles([2.0])
    assert single is not None and single.p50 == single.p99 == 2.0


def test_the_steady_window_leaves_ramp_and_drain_out() -> None:
    """Two workers: full from 1 to 4; the first starts alone, the last ends alone."""
    first = sampled(0.0, text(0.5, 10), text(2.0, 20))
    second = sampled(1.0, text(3.0, 10), text(4.0, 20))
    third = sampled(2.0, text(3.5, 5), text(9.0, 10))
    assert steady_rate([first, second, third], [], 2) == pytest.approx((10 + 10 + 10 + 5) / 3)


def test_no_steady_window_if_the_load_was_never_full() -> None:
    assert steady_rate([sampled(0.0, text(1.0), text(2.0))], [], 4) is None


def test_a_failed_request_keeps_the_load_full() -> None:
    sample = sampled(0.0, text(1.0), text(2.0))
    assert steady_rate([sample], [Failure(0.0, 2.0, "lost")], 2) == pytest.approx(1.0)
