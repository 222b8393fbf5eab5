import pytest

from infopt.core.training.schedule import cosine_rate, windows_of_step


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [cosine_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert cosine_rate(0, 1, 0) == 1.0


def test_every_window_comes_once_a_round_in_a_new_order() -> None:
    seen = [windows_of_step(step, 2, 6, seed=5) for step in range(6)]
    first, second = ([w for step in part for w in step] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert windows_of_step(4, 2, 6, seed=5) == seen[4], "a step needs no memory of those before"
    assert windows_of_step(4, 2, 6, seed=500) != seen[4]
