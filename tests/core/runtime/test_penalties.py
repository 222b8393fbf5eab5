"""Penalties against transformers' processors, and against the definitions where it has none."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from infopt.core.runtime.penalties import changes_logits, masked, penalized
from infopt.core.runtime.request import SamplingParams

PROMPT, ANSWER = [3, 5, 5, 9], [5, 7, 7, 7]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_is_transformers(logits: torch.Tensor, penalty: float) -> None:
    found = penalized(logits, SamplingParams(repetition_penalty=penalty), PROMPT, ANSWER)
    judge = RepetitionPenaltyLogitsProcessor(penalty)
    wanted = judge(torch.tensor([PROMPT + ANSWER]), logits[None].clone())[0]
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, logits)


def test_bias_comes_before_repetition_as_in_transformers(logits: torch.Tensor) -> None:
    params = SamplingParams(repetition_penalty=1.5, logit_bias=((5, -3.0), (11, 2.5)))
    found = penalized(logits, params, PROMPT, ANSWER)
    ids = torch.tensor([PROMPT + ANSWER])
    biased = SequenceBiasLogitsProcessor([[[5], -3.0], [[11], 2.5]])(ids, logits[None].clone())
    wanted = RepetitionPenaltyLogitsProcessor(1.5)(ids, biased)[0]
    torch.testing.assert_close(found, wanted)


def test_presence_and_frequency_are_openais(logits: torch.Tensor) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, counted in the answer alone."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    wanted = logits.clone()
    wanted[5] -= 0.5 + 0.25
    wanted[7] -= 0.5 + 3 * 0.25
    torch.testing.assert_close(penalized(logits, params, PROMPT, ANSWER), wanted)
    torch.testing.assert_close(penalized(logits, params, PROMPT, []), logits)


def test_the_logits_given_stay_as_they_were(logits: torch.Tensor) -> None:
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2, logit_bias=((1, 5.0),), frequency_penalty=1)
    penalized(logits, params, PROMPT, ANSWER)
    masked(logits, torch.zeros(12, dtype=torch.bool), [1])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((0, 1.0),)},
    ],
    ids=str,
)
def test_what_changes_logits_says_so(change: dict[str, float]) -> None:
    assert changes_logits(SamplingParams(**change))  # type: ignore[arg-type]
    assert not changes_logits(SamplingParams(temperature=0.3, top_p=0.5, min_p=0.1))


def test_masks(logits: torch.Tensor) -> None:
    allowed = torch.zeros(12, dtype=torch.bool)
    allowed[[2, 4, 6]] = True
    found = masked(logits, allowed, [4])
    assert torch.isfinite(found).nonzero().flatten().tolist() == [2, 6]
    assert torch.equal(found[[2, 6]], logits[[2, 6]])
    assert masked(logits, None, ()) is logits
