"""The search by itself, on tables of log probabilities."""

import itertools
import math

import pytest
import torch

from infopt.core.runtime.beam_search import BeamRules, BeamSearch, EarlyStopping


def run(
    rules: BeamRules, table: torch.Tensor, steps: int = 50
) -> tuple[BeamSearch, list[list[tuple[int, ...]]]]:
    """Search where the next token depends on the last one alone: table [vocabulary, vocabulary]."""
    search, seen = BeamSearch(rules), []
    for _ in range(steps):
        if not search.beams:
            break
        lasts = [beam.tokens[-1] if beam.tokens else 0 for beam in search.beams]
        before = [beam.tokens for beam in search.beams]
        parents = search.advance(table[lasts])
        assert [beam.tokens[:-1] for beam in search.beams] == [before[p] for p in parents]
        seen.append([beam.tokens for beam in search.beams])
    return search, seen


def rules_of(
    width: int, longest: int, ends: tuple[int, ...] = (), penalty: float = 1.0,
    early: EarlyStopping = False,
) -> BeamRules:  # fmt: skip
    return BeamRules(width, penalty, early, frozenset(ends), longest)


def test_a_wide_search_finds_the_best_of_all() -> None:
    torch.manual_seed(0)
    table = torch.randn(4, 4).log_softmax(-1)
    search, _ = run(rules_of(width=64, longest=3), table)
    scored = []
    for tokens in itertools.product(range(4), repeat=3):
        path = (0, *tokens)
        total = sum(float(table[a, b]) for a, b in itertools.pairwise(path))
        scored.append((total / 3, tokens))
    scored.sort(reverse=True)
    assert {found.tokens for found in search.complete} == {tokens for _, tokens in scored}
    assert [f.score for f in search.complete] == pytest.approx([score for score, _ in scored])


def test_one_beam_is_greedy() -> None:
    torch.manual_seed(1)
    table = torch.randn(6, 6).log_softmax(-1)
    search, _ = run(rules_of(width=1, longest=5), table)
    token, wanted = 0, []
    for _ in range(5):
        token = int(table[token].argmax())
        wanted.append(token)
    assert search.complete[0].tokens == tuple(wanted)


def test_as_many_go_on_as_are_wanted_whatever_ends() -> None:
    """The three likeliest tokens all end."""
    table = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.07]).log().expand(6, 6)
    search, seen = run(rules_of(width=2, longest=4, ends=(0, 1, 2), early="never"), table, steps=1)
    assert seen == [[(3,), (4,)]]
    assert [found.tokens for found in search.complete] == [(0,), (1,)]


def test_a_length_penalty_favours_the_long_or_the_short() -> None:
    table = torch.tensor([0.4, 0.35, 0.25]).log().expand(3, 3)
    short, _ = run(rules_of(2, longest=6, ends=(0,), penalty=0.0, early="never"), table)
    long, _ = run(rules_of(2, longest=6, ends=(0,), penalty=3.0, early="never"), table)
    assert len(short.complete[0].tokens) == 1 and len(long.complete[0].tokens) == 6
    assert short.complete[0].score == pytest.approx(math.log(0.4))


@pytest.mark.parametrize(("early", "steps"), [(True, 2), (False, 3), ("never", 6)])
def test_when_it_stops(early: EarlyStopping, steps: int) -> None:
    """Each step completes an answer; after three the best beam, -0.902, is below the second best,
    -0.901, and only length could make it better."""
    first, likely, even = [0.35, 0.01, 0.33, 0.31], [0.5, 0.0001, 0.45, 0.0499], [0.25] * 4
    table = torch.tensor([first, first, likely, even]).log()
    _, seen = run(rules_of(2, longest=6, ends=(0, 1), early=early), table)
    assert len(seen) == steps
