"""Parameter counts by hand, and the shapes that budgets leave."""

import pytest

from infopt.core.errors import UsageError
from infopt.core.pruning.sizes import Cost, Shape, between, rounded, solve, terms, width_step

WHOLE = Shape(layers=30, groups=3, ffn=1536, hidden=576)
"""SmolLM2-135M."""
QUERY, KEY = (576, 576), (192, 576)
HEADS = {0: "heads", 1: "hidden"}


def smol() -> Cost:
    block = [
        (QUERY, HEADS),
        (KEY, HEADS),
        (KEY, HEADS),
        (QUERY, {1: "heads", 0: "hidden"}),
        ((1536, 576), {0: "ffn", 1: "hidden"}),
        ((1536, 576), {0: "ffn", 1: "hidden"}),
        ((576, 1536), {1: "ffn", 0: "hidden"}),
        ((576,), {0: "hidden"}),
        ((576,), {0: "hidden"}),
    ]
    ends = [((49152, 576), {1: "hidden"}), ((576,), {0: "hidden"})]
    return Cost(terms(block, WHOLE), terms(ends, WHOLE))


def test_the_count_is_the_models() -> None:
    assert smol().of(WHOLE) == 134_515_008  # as its card says
    half = Shape(15, 3, 768, 288)
    by_hand = 15 * (2 * 288 * 576 + 2 * 192 * 288 + 3 * 768 * 288 + 2 * 288) + 49153 * 288
    assert smol().of(half) == by_hand


def test_a_budget_narrows_then_leaves_out_blocks() -> None:
    cost = smol()
    small = solve(cost, WHOLE, 125e6, narrow=True, what="params")
    assert small.layers == 30
    assert 1152 <= small.ffn < 1536
    assert small.ffn % 32 == 0
    assert cost.of(small) <= 125e6
    assert cost.of(Shape(30, 3, small.ffn + 32, 576)) > 125e6
    fewer = solve(cost, WHOLE, 100e6, narrow=True, what="params")
    assert fewer == Shape(24, 3, 1184, 576)
    assert cost.of(fewer) <= 100e6 < cost.of(Shape(24, 3, 1216, 576))
    least = solve(cost, WHOLE, 31e6, narrow=True, what="params")
    assert least.layers >= 1
    assert cost.of(least) <= 31e6


def test_where_channels_cannot_be_cut_only_blocks_go() -> None:
    found = solve(smol(), WHOLE, 100e6, narrow=False, what="params")
    assert found.ffn == 1536
    assert found.layers == 20


def test_what_is_out_of_reach_is_refused_with_the_range() -> None:
    for budget in (10e6, 134_515_008):
        with pytest.raises(UsageError, match=r"params .*not reachable.*29\.9M to .*134\.5M"):
            solve(smol(), WHOLE, budget, narrow=True, what="params 10M")


def test_rounds_meet_the_target() -> None:
    target = Shape(20, 3, 1152, 576)
    shapes = between(WHOLE, target, 3)
    assert shapes[-1] == target
    assert [s.layers for s in shapes] == sorted((s.layers for s in shapes), reverse=True)
    assert all(s.ffn % 32 == 0 for s in shapes)
    assert between(WHOLE, target, 1) == [target]
    # Rounds that would change nothing are none.
    assert between(Shape(2, 1, 8, 8), Shape(1, 1, 8, 8), 5) == [Shape(1, 1, 8, 8)]


def test_widths_are_rounded() -> None:
    assert rounded(0.75 * 1536, 1536, width_step(1536)) == 1152
    assert rounded(1000, 1536, 32) == 992
    assert rounded(3, 1536, 32) == 32
    assert width_step(64) == 8
