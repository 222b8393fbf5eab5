import math

import pytest
import torch

from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.sampler import Choice, Draw, _invert, sample, token_logprobs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(logits: torch.Tensor, count: int, **params: float) -> torch.Tensor:
    """Relative frequencies of the tokens in `count` draws."""
    chosen = SamplingParams(**params)  # type: ignore[arg-type]
    generator = seeded(0)
    tokens = [sample(logits[None], [Draw(chosen, generator)])[0].token_id for _ in range(count)]
    assert None not in tokens
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def truth(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """The distribution by a full sort."""
    scaled = logits.double() / temperature
    scaled[scaled.softmax(-1) < min_p * scaled.softmax(-1).max()] = -torch.inf
    order = scaled.argsort(descending=True)
    keep = order[: top_k or len(order)]
    probabilities = scaled[keep].softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0)
    return torch.zeros(len(logits), dtype=torch.float64).scatter(0, keep, kept / kept.sum())


def test_greedy_is_the_exact_argmax_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    greedy = SamplingParams(temperature=0)
    assert sample(logits, [Draw(greedy, seeded(0))] * 2) == [Choice(1), Choice(0)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.5},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.9},
        {"min_p": 0.2},
        {"temperature": 2.0, "min_p": 0.1, "top_p": 0.7},
        {"min_p": 0.1, "top_k": 2},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    logits = torch.randn(12, generator=seeded(1)) * 2
    wanted = truth(logits, **params)  # type: ignore[arg-type]
    found = draws(logits, 4000, **params)
    assert ((found > 0) <= (wanted > 0)).all(), "never a token that was cut off"
    assert float((found - wanted).abs().max()) < 4 * math.sqrt(0.25 / 4000)


def test_a_nucleus_wider_than_the_window_is_found() -> None:
    """A flat distribution over more tokens than the sampler's first window."""
    logits = torch.zeros(5000)
    logits[4000:] = -30.0
    generator = seeded(0)
    params = SamplingParams(top_p=0.9999)
    tokens = {sample(logits[None], [Draw(params, generator)])[0].token_id for _ in range(3000)}
    assert len(tokens) > 1900
    assert max(token for token in tokens if token is not None) < 4000


@pytest.mark.parametrize("top_p", [1e-9, 1.0])
def test_a_tiny_temperature_is_greedy(top_p: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.999]])
    params = SamplingParams(temperature=1e-300, top_p=top_p)
    assert sample(logits, [Draw(params, seeded(3))]) == [Choice(1)]


def test_a_seed_draws_the_same_whatever_is_beside_it() -> None:
    logits = torch.randn(3, 50, generator=seeded(2))
    params = [SamplingParams(temperature=t, top_k=k) for t, k in ((0.9, 0), (1.5, 7), (0.0, 0))]
    together = sample(logits, [Draw(each, seeded(s)) for s, each in enumerate(params)])
    for row in range(3):
        alone = sample(logits[row : row + 1], [Draw(params[row], seeded(row))])
        assert alone == [together[row]]


def test_logprobs_are_of_the_model_not_of_the_draw() -> None:
    logits = torch.randn(1, 20, generator=seeded(4))
    params = SamplingParams(temperature=0.3, top_k=2, logprobs=3)
    choice = sample(logits, [Draw(params, seeded(0))])[0]
    wanted = logits[0].log_softmax(-1)
    assert choice.logprob is not None and choice.token_id is not None
    assert choice.logprob.logprob == pytest.approx(float(wanted[choice.token_id]))
    values, tokens = wanted.topk(3)
    assert [token for token, _ in choice.logprob.top] == tokens.tolist()
    assert [value for _, value in choice.logprob.top] == pytest.approx(values.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_spoil_their_own_row_only(bad: float) -> None:
    logits = torch.randn(3, 40, generator=seeded(5))
    logits[1, 17] = bad
    params = [SamplingParams(temperature=t) for t in (0.0, 0.0, 1.0)]
    choices = sample(logits, [Draw(each, seeded(0)) for each in params])
    assert choices[1] == Choice(None)
    assert choices[0].token_id == int(logits[0].argmax())
    assert choices[2].token_id is not None


def test_no_rows() -> None:
    assert sample(torch.empty(0, 9), []) == []


def test_a_rounded_sum_never_draws_what_was_cut_off() -> None:
    """Ten equal tokens, then one that cannot be: at a number next to 1 the last of the ten."""
    probabilities = torch.cat([torch.full((10,), 0.1, dtype=torch.float64), torch.zeros(1)])
    assert _invert(probabilities, math.nextafter(1.0, 0.0)) == 9
    assert _invert(probabilities, 0.0) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_is_allowed_and_not_barred(temperature: float) -> None:
    logits = torch.randn(2, 30, generator=seeded(6))
    allowed = torch.zeros(30, dtype=torch.bool)
    allowed[[3, 4, 5]] = True
    params = SamplingParams(temperature=temperature)
    generator = seeded(0)
    drawn = set()
    for _ in range(50):
        free = Draw(params, generator)
        found = sample(logits, [Draw(params, generator, allowed=allowed, barred=[4]), free])
        drawn.add(found[0].token_id)
    assert drawn <= {3, 5} and (temperature == 0) is (len(drawn) == 1)


def test_penalties_steer_the_choice_and_not_the_logprobs() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]])
    params = SamplingParams(temperature=0, frequency_penalty=2, logprobs=1)
    (choice,) = sample(logits, [Draw(params, seeded(0), prompt=[2], answer=[1])])
    assert choice.token_id == 2 and choice.logprob is not None
    assert choice.logprob.logprob == pytest.approx(float(logits[0].log_softmax(-1)[2]))
    assert choice.logprob.top[0][0] == 1


def test_token_logprobs_of_many_rows() -> None:
    logits = torch.randn(4, 9, generator=seeded(8))
    found = token_logprobs(logits, [3, 1, 0, 8], 0)
    wanted = logits.log_softmax(-1)[range(4), [3, 1, 0, 8]]
    assert [entry.logprob for entry in found] == pytest.approx(wanted.tolist())
    assert [entry.token_id for entry in found] == [3, 1, 0, 8]
    assert all(entry.top == () for entry in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_where_nothing_may_come_next_there_is_no_token(temperature: float, top_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p)
    logits = torch.randn(2, 5, generator=seeded(1))
    barred = Draw(params, seeded(0), barred=range(5))
    nothing = Draw(params, seeded(0), allowed=torch.zeros(5, dtype=torch.bool))
    for choice in sample(logits, [barred, nothing]):
        assert choice.token_id is None and "no token may come next" in str(choice.fault)
