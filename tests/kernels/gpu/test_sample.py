"""Sampling without a sort: which tokens can come at all, and how often each does."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.kernels.gpu import sample as module
from infopt.kernels.gpu.sample import Choosing, reference, sample
from infopt.kernels.gpu.tile import Card, Rule, Tile

VOCABULARY = 77
_LEAST_SHARE = 1e-5
"""Of which float32 numbers below 1 still tell the middle."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small(card: Card) -> Card:
    """Blocks that a vocabulary has several of."""
    return card.preferring({"sample": [Rule({}, Tile({"BLOCK": 32}, 4, 1))]})


def choosing(
    rows: int,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Choosing:
    def all_of(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=uniform.device)

    return Choosing(
        temperature=all_of(temperature),
        top_k=all_of(top_k, torch.int32),
        top_p=all_of(top_p),
        log_min_p=all_of(math.log(min_p) if min_p else -math.inf),
        uniform=uniform,
    )


def logits_of(kind: str, device: torch.device) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(VOCABULARY) * 2
    match kind:
        case "ties":
            x = torch.randint(0, 3, (VOCABULARY,)).float()
        case "all alike":
            x = torch.full((VOCABULARY,), 1.5)
        case "masked":
            x[torch.randperm(VOCABULARY)[:70]] = -torch.inf
        case "one left":
            x[torch.arange(VOCABULARY) != 40] = -torch.inf
        case "late":  # in the last block, what comes after ties
            x = torch.ones(VOCABULARY)
            x[70:] = 2
        case "large":
            x = x * 1000
    return x.to(device)


def drawn(
    logits: Tensor, card: Card, uniform: Tensor, kernels: ModuleType = module, **how: Any
) -> Tensor:
    """The tokens that uniform numbers stand for; rows stand in wider ones."""
    rows = torch.full((len(uniform), len(logits) + 3), torch.nan, device=logits.device)
    rows = rows.to(logits.dtype)[:, : len(logits)]
    rows.copy_(logits)
    return kernels.sample(card, rows, choosing(len(uniform), uniform, **how))


def check(
    logits: Tensor, card: Card, kernels: ModuleType = module, most: int = 6, **how: Any
) -> None:
    """The number in the middle of each token's share stands for it: of all tokens, or of some all
    over the vocabulary and of those with the least shares, which a wrong cut moves the most."""
    uniform = torch.zeros(1, device=logits.device)
    wanted = reference(logits[None], choosing(1, uniform, **how))[0]
    kept = (wanted > _LEAST_SHARE).nonzero()[:, 0]
    if len(kept) > most:
        least = wanted[kept].argsort()[: most // 2]
        spread = torch.linspace(0, len(kept) - 1, most - most // 2).long().to(kept.device)
        kept = kept[torch.cat((least, spread))]
    middles = wanted.cumsum(0)[kept] - wanted[kept] / 2
    found = drawn(logits, card, middles.float(), kernels, **how)
    assert torch.equal(found, kept), f"not close: {found.tolist()}, not {kept.tolist()}"


HOW = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top k": {"top_k": 5},
    "top k of one": {"top_k": 1},
    "top k of all": {"top_k": 1000},
    "top p": {"top_p": 0.7},
    "top p of next to nothing": {"top_p": 1e-6},
    "min p": {"min_p": 0.2},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.81, "min_p": 0.03},
    "greedy": {"temperature": 0.0},
}


EDGES = ("all alike", "masked", "one left", "large", "late")


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, name) for kind in ("normal", "ties") for name in HOW), *((k, "all") for k in EDGES)],
)
def test_each_token_has_its_share(kind: str, name: str, device: torch.device, small: Card) -> None:
    check(logits_of(kind, device), small, **HOW[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits(dtype: torch.dtype, device: torch.device, small: Card) -> None:
    logits = logits_of("normal", device).to(dtype)
    check(logits, small, top_k=9, top_p=0.8)


@given(
    seed=st.integers(0, 2**31),
    step=st.sampled_from([0.0, 0.25, 1.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 40]),
    top_p=st.sampled_from([0.031, 0.53, 0.917, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.37]),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_distribution_of_anything(
    device: torch.device, small: Card, seed: int, step: float, **how: Any
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(VOCABULARY) * 2
    if step:  # many tokens share a value
        logits = (logits / step).round() * step
    check(logits.to(device), small, most=3, **how)


def test_the_cut_of_a_large_vocabulary_is_exact(device: torch.device, card: Card) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5000, device=device) * 3
    check(logits, card, top_k=50, top_p=0.9, temperature=0.7)


def test_draws_of_a_generator_pass_a_chi_square_test(device: torch.device, small: Card) -> None:
    """At a significance of one in a million, with a fixed seed: it does not fail by chance."""
    logits, count = torch.linspace(0, 2, 8, device=device), 120
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(5)).to(device)
    how = choosing(count, uniform)
    tokens = sample(small, logits.expand(count, -1).contiguous(), how)
    wanted = reference(logits[None], how)[0] * count
    seen = torch.bincount(tokens, minlength=8).double()
    statistic = ((seen - wanted).square() / wanted).sum()
    freedom = 7
    # Wilson and Hilferty's approximation of the chi-square distribution's quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert float(statistic) < bound


def test_rows_are_chosen_from_each_in_its_own_way(device: torch.device, small: Card) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCABULARY, device=device)
    uniform = torch.rand(4, device=device)
    how = Choosing(
        temperature=torch.tensor([0.0, 0.5, 1.0, 2.0], device=device),
        top_k=torch.tensor([0, 3, 0, 7], dtype=torch.int32, device=device),
        top_p=torch.tensor([1.0, 1.0, 0.5, 0.9], device=device),
        log_min_p=torch.tensor([-math.inf, -math.inf, -1.0, -2.0], device=device),
        uniform=uniform,
    )
    together = sample(small, logits, how)
    for row in range(4):
        one = slice(row, row + 1)
        alone = Choosing(
            how.temperature[one], how.top_k[one], how.top_p[one], how.log_min_p[one], uniform[one]
        )
        assert sample(small, logits[one], alone)[0] == together[row]
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_has_no_token(
    bad: float, temperature: float, device: torch.device, small: Card
) -> None:
    logits = torch.randn(2, VOCABULARY, device=device)
    logits[1, 40] = bad
    uniform = torch.full((2,), 0.5, device=device)
    tokens = sample(small, logits, choosing(2, uniform, temperature=temperature)).tolist()
    assert tokens[0] >= 0 and tokens[1] == -1


def test_no_number_leads_past_the_end(device: torch.device, small: Card) -> None:
    logits = logits_of("masked", device)[None]
    uniform = torch.tensor([1 - 2**-24], device=device)
    for name in ("plain", "top k", "top p", "all"):
        how = HOW[name]
        token = int(sample(small, logits, choosing(1, uniform, **how)))
        assert reference(logits, choosing(1, uniform, **how))[0, token] > 0


MUTATIONS = {
    "the slope": ("slope = _LOG2_E / temperature", "slope = 1.0 / temperature", {}),
    "the floor": ("tl.load(log_min_ps + row) * temp", "tl.load(log_min_ps + row) * 2 * temp",
                  {"min_p": 0.2}),
    "what is weighed": ("(many if COUNTS else heavy) < wanted", "many < wanted", {"top_p": 0.7}),
    "ties of k": ("ties = (k - number).to(tl.int32)", "ties = (k * 1).to(tl.int32)", {"top_k": 5}),
    "a share of what is left": ("wanted = p * total", "wanted = p * heavy",
                                {"top_k": 5, "top_p": 0.7}),
    "ties of p": ("needed = tl.minimum(needed, bound)", "needed = bound", {"top_p": 0.7}),
    "where ties began": ("tied += tl.sum", "tied = tl.sum", {"top_k": 47}),
    "the start": ("before += tl.sum(weight, axis=0)", "before = tl.sum(weight, axis=0)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_kernel_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    small: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    text, other, how = MUTATIONS[name]
    wrong = mutated(module, text, other)
    with pytest.raises(AssertionError, match="not close"):
        for kind in ("normal", "ties", "late"):
            check(logits_of(kind, device), small, wrong, most=16, **how)
