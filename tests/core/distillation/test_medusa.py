import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.distillation import medusa
from infopt.core.distillation.medusa import NOTHING, Projection


def projection(vocabulary: int = 11, hidden: int = 6, **changes: object) -> Projection:
    torch.manual_seed(1)
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64)
    bias = torch.randn(vocabulary, dtype=torch.float64)
    return Projection(weight, bias, **changes)  # type: ignore[arg-type]


def layer(hidden: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    weight = torch.randn(hidden, hidden, dtype=torch.float64)
    return weight, torch.randn(hidden, dtype=torch.float64)


def test_the_commonest_tokens_and_their_places() -> None:
    seen = torch.tensor([[5, 5, 2], [9, 5, 2]])
    assert medusa.commonest(seen, 2).tolist() == [2, 5]
    assert medusa.commonest(seen, 50).tolist() == [2, 5, 9]
    places = medusa.places_of(torch.tensor([2, 5]), 7)
    assert places.tolist() == [-1, -1, 0, -1, -1, 1, -1]


def test_a_head_of_zeros_says_what_the_base_says() -> None:
    states = torch.randn(3, 4, 6)
    zeros = (torch.zeros(6, 6), torch.zeros(6))
    assert torch.equal(medusa.head_states(states, [zeros, zeros]), states)


def test_a_layer_adds_its_silu() -> None:
    states = torch.randn(5, 6, dtype=torch.float64)
    weight, bias = layer()
    inner = states @ weight.T + bias
    once = states + inner / (1 + torch.exp(-inner))
    assert torch.allclose(medusa.head_states(states, [(weight, bias)]), once)
    inner = once @ weight.T + bias
    twice = once + inner / (1 + torch.exp(-inner))
    assert torch.allclose(medusa.head_states(states, [(weight, bias)] * 2), twice)


def test_head_k_is_asked_for_the_token_k_further_on() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    follow = medusa.following(tokens)
    assert follow.tolist() == [[11, 12, 13, 14, NOTHING]]
    assert medusa.ahead(follow, 0).tolist() == follow.tolist()
    assert medusa.ahead(follow, 1).tolist() == [[12, 13, 14, NOTHING, NOTHING]]
    assert medusa.ahead(follow, 3).tolist() == [[14] + [NOTHING] * 4]
    assert medusa.ahead(follow, 9).tolist() == [[NOTHING] * 5]


@pytest.mark.parametrize("changes", [{}, {"softcap": 3.0}, {"scale": 0.25}], ids=str)
def test_the_chunked_loss_is_the_plain_one(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medusa, "_CHUNK_BYTES", 4 * 11 * 3)  # three rows at once
    mine = projection(**changes)
    torch.manual_seed(0)
    states = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mine.weight.requires_grad_()
    targets = torch.randint(11, (2, 5))
    targets[0, 3:] = NOTHING
    logits = states @ mine.weight.T + mine.bias
    if "scale" in changes:
        logits = logits * 0.25
    if "softcap" in changes:
        logits = 3.0 * torch.tanh(logits / 3.0)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOTHING)
    wanted = torch.autograd.grad(2 * plain, [states, mine.weight])
    loss = medusa.cross_entropy(states, mine, targets)
    assert torch.allclose(loss, plain)
    found = torch.autograd.grad(2 * loss, [states, mine.weight])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other)
    with torch.no_grad():
        assert torch.allclose(medusa.cross_entropy(states, mine, targets), plain)


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medusa, "_CHUNK_BYTES", 4 * 11 * 2)
    mine = projection(softcap=2.0)
    targets = torch.tensor([3, NOTHING, 0, 10, 7])
    weight, bias = layer()
    states = torch.randn(5, 6, dtype=torch.float64)

    def loss(weight: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        guess = medusa.head_states(states, [(weight, bias)])
        own = Projection(table, mine.bias, mine.softcap)
        return medusa.medusa_loss([medusa.cross_entropy(guess, own, targets)])

    leaves = [x.clone().requires_grad_() for x in (weight, bias, mine.weight)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_the_loss_of_uniform_guesses_is_the_log_of_the_vocabulary() -> None:
    flat = Projection(torch.zeros(11, 6, dtype=torch.float64))
    loss = medusa.cross_entropy(torch.randn(4, 6).double(), flat, torch.tensor([0, 1, 2, NOTHING]))
    assert float(loss) == pytest.approx(math.log(11))
    nobody = medusa.cross_entropy(torch.randn(2, 6).double(), flat, torch.full((2,), NOTHING))
    assert float(nobody) == 0.0


def test_heads_weigh_less_the_further_they_look() -> None:
    losses = [torch.tensor(1.0), torch.tensor(10.0), torch.tensor(100.0)]
    assert float(medusa.medusa_loss(losses)) == pytest.approx(0.8 + 6.4 + 51.2)


def test_ranks_and_shares() -> None:
    guessed = torch.tensor([[4, 2, 9], [1, 0, 5], [7, 8, 3], [6, 6, 6]])
    targets = torch.tensor([4, 5, 0, NOTHING])
    places = medusa.ranks(guessed, targets)
    assert places.tolist() == [0, 2, 3, NOTHING]
    assert medusa.share_within(places, 1) == pytest.approx(1 / 3)
    assert medusa.share_within(places, 3) == pytest.approx(2 / 3)
    assert medusa.share_within(torch.full((2,), NOTHING), 1) == 0.0


def test_guesses_are_the_likeliest_tokens() -> None:
    mine = projection()
    states = torch.randn(2, 3, 6, dtype=torch.float64)
    logits = states @ mine.weight.T + mine.bias
    found = medusa.guesses(states, mine, 4)
    assert torch.equal(found, logits.argsort(-1, descending=True)[..., :4])


def test_a_run_ends_at_the_first_wrong_head() -> None:
    first = torch.tensor([0, 0, 1, 0, NOTHING])
    second = torch.tensor([0, 2, 0, 0, 0])
    third = torch.tensor([0, 0, 0, 5, 0])
    # Runs of 3, 1, 0 and 2; the last position has no target for every head.
    assert medusa.mean_run([first, second, third]) == pytest.approx(6 / 4)
    assert medusa.mean_run([torch.full((2,), NOTHING)]) == 0.0


def test_the_baseline_knows_the_commonest_tokens_of_the_training() -> None:
    seen = torch.tensor([5, 5, 5, 1, 1, 7])
    targets = torch.tensor([5, 1, 7, 5, NOTHING])
    assert medusa.unigram_share(seen, targets, 1, 10) == pytest.approx(2 / 4)
    assert medusa.unigram_share(seen, targets, 2, 10) == pytest.approx(3 / 4)


def test_foresight_finds_the_map_that_states_follow() -> None:
    generator = torch.Generator().manual_seed(0)
    step = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    states = [torch.randn(8, generator=generator, dtype=torch.float64)]
    for _ in range(400):
        noise = 0.01 * torch.randn(8, generator=generator, dtype=torch.float64)
        states.append(step @ states[-1] + noise)
    now, later = torch.stack(states[:-1]), torch.stack(states[1:])
    found = medusa.foresight(now.T @ now, later.T @ now)
    assert float((found - step).norm() / step.norm()) < 0.02
