"""Choosing tokens by a GPU's kernel, under the interpreter, beside the sampler of the CPU."""

import importlib.util
from typing import Any

import pytest
import torch

from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.sampler import NOTHING_LEFT, Draw, sample
from infopt.kernels.gpu.tile import H100, Card

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted
CARD = Card.with_shipped(**H100)
VOCABULARY = 50


def draw(seed: int = 0, **more: Any) -> Draw:
    parts = {"prompt", "answer", "allowed", "barred"}
    params = {key: value for key, value in more.items() if key not in parts}
    rest = {key: value for key, value in more.items() if key in parts}
    return Draw(SamplingParams(**params), torch.Generator().manual_seed(seed), **rest)


def only(*tokens: int) -> torch.Tensor:
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[list(tokens)] = True
    return allowed


ONE_CHOICE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top k of one": {"top_k": 1},
    "next to no temperature": {"temperature": 1e-4},
    "allowed": {"allowed": only(7)},
    "barred, greedy": {"temperature": 0.0, "barred": (0, 1, 2, 3)},
    "bias": {"logit_bias": ((9, 100.0),), "top_p": 0.5},
    "penalties": {"temperature": 0.0, "repetition_penalty": 2.0, "prompt": (0, 1), "answer": (2,)},
    "presence": {"temperature": 0.0, "presence_penalty": 2.0, "answer": (0, 1, 2)},
    "log probabilities": {"temperature": 0.0, "logprobs": 3},
}


def test_one_choice_is_the_cpus() -> None:
    from infopt.core.runtime.card_sampler import sample_on_card

    torch.manual_seed(0)
    logits = torch.randn(len(ONE_CHOICE), VOCABULARY).sort(descending=True).values
    draws = [draw(**how) for how in ONE_CHOICE.values()]
    for name, ours, cpus in zip(
        ONE_CHOICE, sample_on_card(CARD, logits, draws), sample(logits, draws), strict=True
    ):
        assert ours == cpus, name
    assert torch.equal(logits, logits.sort(descending=True).values), "logits are left as they are"


def test_a_seed_gives_its_token_whatever_runs_beside() -> None:
    from infopt.core.runtime.card_sampler import sample_on_card

    torch.manual_seed(0)
    logits = torch.randn(5, VOCABULARY)
    together = sample_on_card(CARD, logits, [draw(seed, top_p=0.9) for seed in range(5)])
    alone = [
        sample_on_card(CARD, logits[seed : seed + 1], [draw(seed, top_p=0.9)])[0]
        for seed in range(5)
    ]
    assert together == alone and len({choice.token_id for choice in together}) > 1


def test_what_has_no_token_says_why() -> None:
    from infopt.core.runtime.card_sampler import sample_on_card

    logits = torch.randn(4, VOCABULARY)
    logits[0, 3], logits[1, 4] = torch.nan, -torch.inf
    draws = [draw(), draw(), draw(allowed=only()), draw(temperature=0.0, allowed=only())]
    found = sample_on_card(CARD, logits, draws)
    assert [choice.token_id for choice in found] == [None] * 4
    assert [choice.fault for choice in found] == [None, None, NOTHING_LEFT, NOTHING_LEFT]
    assert found == sample(logits, draws)


def test_greedy_draws_take_no_number() -> None:
    from infopt.core.runtime.card_sampler import sample_on_card

    greedy, drawn = draw(3, temperature=0.0), draw(3)
    sample_on_card(CARD, torch.randn(2, VOCABULARY), [greedy, drawn])
    fresh = torch.Generator().manual_seed(3).get_state()
    assert torch.equal(greedy.generator.get_state(), fresh)
    assert not torch.equal(drawn.generator.get_state(), fresh)


def test_a_step_that_answers_nobody() -> None:
    from infopt.core.runtime.card_sampler import sample_on_card

    assert sample_on_card(CARD, torch.empty(0, VOCABULARY), []) == []
