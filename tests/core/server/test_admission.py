from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.server.admission import Bounds, Gate, Place
from infopt.core.server.faults import ApiError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def gate(requests: int = 4, tokens: int = 100, **more: float) -> Gate:
    return Gate(Bounds(requests, tokens, **more), Clock())  # type: ignore[arg-type]


def refused(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    assert caught.value.status == 429 and 1 <= int(caught.value.headers["retry-after"]) <= 60
    return caught.value


def test_one_prompt_too_many() -> None:
    it = gate(requests=2)
    first, second = it.queue([5]) + it.queue([5])
    assert refused(lambda: it.queue([5])).code == "queue_full"
    first.leave()
    first.leave()
    (third,) = it.queue([5])
    assert it.queued_requests == 2
    second.leave()
    third.leave()
    assert (it.queued_requests, it.queued_tokens) == (0, 0)


def test_a_token_too_many() -> None:
    it = gate(tokens=10)
    it.queue([6])
    assert "with 5 more" in str(refused(lambda: it.queue([5])))
    it.queue([4])


def test_all_prompts_of_a_request_or_none() -> None:
    it = gate(requests=3)
    it.queue([1])
    refused(lambda: it.queue([1, 1, 1]))
    assert it.queued_requests == 1
    assert len(it.queue([1, 1])) == 2


def test_alone_a_request_may_be_larger_than_the_queue() -> None:
    assert len(gate(requests=2).queue([1] * 5)) == 5
    assert len(gate(tokens=10).queue([50])) == 1


@given(st.lists(st.one_of(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 9))))
def test_what_waits_is_counted(moves: list[list[int] | int]) -> None:
    it = gate()
    inside: list[Place] = []
    for move in moves:
        if isinstance(move, list):
            alone = not inside
            try:
                inside += it.queue(move)
            except ApiError:
                assert not alone
            else:
                assert alone or (it.queued_requests <= 4 and it.queued_tokens <= 100)
        elif inside:
            inside.pop(move % len(inside)).leave()
        assert it.queued_requests == len(inside)
        assert it.queued_tokens == sum(place.tokens for place in inside)


def test_a_clients_rate_fills_evenly() -> None:
    it = gate(rate=60)
    for _ in range(60):
        it.enter("a")
    assert refused(lambda: it.enter("a")).code == "rate_limit_exceeded"
    it.enter("b")
    it.clock.now += 1.01  # type: ignore[attr-defined]
    it.enter("a")
    refused(lambda: it.enter("a"))


def test_a_rate_below_one_a_minute_grants_the_first() -> None:
    it = gate(rate=0.5)
    it.enter("a")
    assert refused(lambda: it.enter("a")).headers["retry-after"] == "60"


def test_a_keys_own_limits_go_first() -> None:
    it = gate(rate=1, concurrency=1)
    leave = it.enter("a", rate=100, concurrency=2)
    it.enter("a", rate=100, concurrency=2)
    assert refused(lambda: it.enter("a", rate=100, concurrency=2)).code == (
        "concurrency_limit_exceeded"
    )
    leave()
    leave()
    it.enter("a", rate=100, concurrency=2)
    refused(lambda: it.enter("a", rate=100, concurrency=2))


def test_retry_after_follows_the_pace_of_the_queue() -> None:
    it = gate(requests=10)
    places = it.queue([1] * 10)
    for place in places[:5]:
        it.clock.now += 3  # type: ignore[attr-defined]
        place.leave()
    it.queue([1] * 5)
    # Five left in 12 s, from the first to now; ten wait.
    assert refused(lambda: it.queue([1])).headers["retry-after"] == "24"
