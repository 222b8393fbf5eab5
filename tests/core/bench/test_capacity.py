import random
from collections.abc import Callable

import pytest

from infopt.core.bench.capacity import MAX_PROBES, PRECISION, Probe, judge, next_rate, only_grows
from infopt.core.reports.bench import Capacity


def searched(meets: Callable[[float], bool], start: float = 1.0) -> tuple[Capacity, list[Probe]]:
    probes: list[Probe] = []
    while (rate := next_rate(probes, start)) is not None:
        probes.append(Probe(rate, meets(rate)))
    return judge(probes, 0.9), probes


@pytest.mark.parametrize("capacity", [0.013, 0.9, 1.0, 7.3, 250.0])
def test_the_capacity_is_bracketed_and_confirmed(capacity: float) -> None:
    found, probes = searched(lambda rate: rate <= capacity)
    assert found.found and found.note == "" and found.contradictions == ()
    assert found.request_rate is not None and found.missed_from is not None
    assert found.request_rate <= capacity < found.missed_from <= found.request_rate * PRECISION
    assert [probe.rate for probe in probes].count(found.request_rate) == 2
    assert len(probes) <= MAX_PROBES


def test_a_server_that_nothing_is_too_much_for() -> None:
    found, probes = searched(lambda rate: True)
    assert not found.found and found.missed_from is None
    assert "the capacity is above it" in found.note and len(probes) == MAX_PROBES


def test_limits_that_are_never_kept() -> None:
    found, _ = searched(lambda rate: False)
    assert not found.found and found.request_rate is None
    assert "limits are not kept" in found.note


def test_a_confirmation_that_fails_is_a_contradiction() -> None:
    seen: list[float] = []

    def meets(rate: float) -> bool:
        seen.append(rate)
        return rate <= 5 and seen.count(rate) == 1

    found, _ = searched(meets)
    assert not found.found and "contradict" in found.note
    (said,) = found.contradictions
    assert "met the limits" in said and "did not" in said
    assert found.request_rate is not None and found.request_rate < (found.missed_from or 0)


def test_noise_ends_in_a_bracket_or_is_told() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        found, probes = searched(lambda rate, rng=rng: rng.random() < 1 / (1 + (rate / 8) ** 6))  # type: ignore[misc]
        assert len(probes) <= MAX_PROBES
        assert found.found == (not found.note)
        assert found.found or found.note


def test_a_queue_that_only_grows() -> None:
    assert only_grows([n // 2 for n in range(600)])
    assert only_grows([10 + n // 20 for n in range(600)])


@pytest.mark.parametrize(
    "looks",
    [
        [n // 2 for n in range(50)],
        [min(n, 100) for n in range(600)],
        [8 + (n * 7919) % 5 for n in range(600)],
        [1000 + n // 100 for n in range(600)],
        [0] * 600,
        [n if n < 300 else 600 - n for n in range(600)],
    ],
    ids=["too few looks", "filled up", "steady", "hardly", "idle", "a burst"],
)
def test_a_queue_that_does_not(looks: list[int]) -> None:
    assert not only_grows(looks)


def test_steady_queues_are_seldom_taken_for_growing() -> None:
    """An M/M/1 queue at 70%: of 200 runs, a few at most look like growth."""
    wrong = 0
    for seed in range(200):
        rng, length, looks = random.Random(seed), 0, []
        for _ in range(2000):
            length = length + 1 if rng.random() < 0.7 / 1.7 else max(0, length - 1)
            looks.append(length)
        wrong += only_grows(looks)
    assert wrong <= 6
