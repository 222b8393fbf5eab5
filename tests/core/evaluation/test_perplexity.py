"""Windows cover each token once; the NLL is the definition's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.errors import UsageError
from infopt.core.evaluation import perplexity as module
from infopt.core.evaluation.perplexity import Window, perplexity, token_nll, windows


@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 200))
def test_every_token_but_the_first_is_scored_once(context: int, stride: int, more: int) -> None:
    stride, tokens = min(stride, context), context + 1 + more
    plan = windows(tokens, context, stride)
    predicted = [p + 1 for w in plan for p in range(w.first, w.stop)]
    assert predicted == list(range(1, tokens))
    for number, window in enumerate(plan):
        assert window.start == number * stride
        assert window.stop - window.start <= context
        assert window.start <= window.first < window.stop
    assert plan[0].scored == context
    assert all(window.scored == stride for window in plan[1:-1])
    # After the first window a scored token sees at least context - stride tokens before its own.
    assert all(w.first - w.start == context - stride for w in plan[1:])


def test_windows_by_hand() -> None:
    assert windows(9, 4, 4) == (Window(0, 0, 4), Window(4, 4, 8))
    assert windows(10, 4, 4) == (Window(0, 0, 4), Window(4, 4, 8), Window(8, 8, 9))
    assert windows(9, 4, 2) == (Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8))
    assert windows(5, 4, 4) == (Window(0, 0, 4),)


def test_a_short_text_is_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match="10 tokens: too few for a window of 16"):
        windows(10, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nll_is_cross_entropy_in_any_chunking(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (torch.randn(37, 50, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    targets = torch.arange(37)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    for chunk in (1, 4 * 50 * 7, 2**26):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
        found = token_nll(logits, targets)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    nll = token_nll(torch.zeros(5, 256), torch.arange(5)).mean()
    assert perplexity(float(nll)) == pytest.approx(256)


def test_an_overflow_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
