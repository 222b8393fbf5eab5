"""Losses beside closed forms and independent computations in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from infopt.core.training import losses
from infopt.core.training.distillation import distillation_loss
from infopt.core.training.losses import (
    Kind,
    TopK,
    attention_loss,
    cross_entropy,
    divergence,
    hidden_loss,
    top_k,
    top_k_divergence,
)

KINDS: tuple[Kind, ...] = ("forward-kl", "reverse-kl", "jsd")


def logits(seed: int, rows: int = 7, vocabulary: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def reference(
    student: Tensor, teacher: Tensor, kind: Kind, temperature: float, beta: float
) -> Tensor:
    """By torch.distributions."""
    p, q = Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    match kind:
        case "forward-kl":
            each = kl_divergence(p, q)
        case "reverse-kl":
            each = kl_divergence(q, p)
        case "jsd":
            m = Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
            each = beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)
    return each.mean() * temperature**2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("chunk", [1 << 20, 4 * 11 * 2])
def test_value_and_gradient_are_those_of_torch(
    kind: Kind, temperature: float, beta: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_BYTES", chunk)
    ours, theirs = (logits(0).requires_grad_() for _ in range(2))
    found = divergence(ours, logits(1), kind=kind, temperature=temperature, beta=beta)
    expected = reference(theirs, logits(1), kind, temperature, beta)
    (3 * found).backward()
    (3 * expected).backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_pass_the_gradient_check(kind: Kind) -> None:
    student = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, logits(1), kind=kind, temperature=2.0, beta=0.3), (student,)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_does_not_diverge_from_itself(kind: Kind, dtype: torch.dtype) -> None:
    student = logits(0).to(dtype).requires_grad_()
    loss = divergence(student, student.detach().clone(), kind=kind, temperature=2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("kind", "share"), [("forward-kl", 1), ("reverse-kl", 1), ("jsd", 0.21)])
def test_at_great_temperature_it_is_the_variance_of_the_difference(
    kind: Kind, share: float
) -> None:
    """T^2 KL tends to Var(z_p - z_q) / 2 over the vocabulary, and JSD to beta (1 - beta) of it."""
    student = logits(0).requires_grad_()
    difference = student.detach() - logits(1)
    difference -= difference.mean(-1, keepdim=True)
    temperature = 1e5
    loss = divergence(student, logits(1), kind=kind, temperature=temperature, beta=0.3)
    assert float(loss.detach()) == pytest.approx(
        share * 0.5 * float(difference.square().mean()), rel=1e-4
    )
    loss.backward()
    # The next term of the series is of second order in the logits: at most max |z|^2 / T a row and
    # token, here 1e-5, whatever the size of the first.
    logit = max(float(z.abs().max()) for z in (student.detach(), logits(1)))
    rest = logit**2 / temperature / difference.numel()
    assert rest < 2e-5
    torch.testing.assert_close(
        student.grad, share * difference / difference.numel(), rtol=1e-4, atol=rest
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_gradient_does_not_depend_on_the_temperature(kind: Kind) -> None:
    norms = []
    for temperature in (50.0, 500.0):
        student = logits(0).requires_grad_()
        divergence(student, logits(1), kind=kind, temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_over_rows_and_never_over_the_vocabulary(kind: Kind) -> None:
    student, teacher = logits(0), logits(1)
    once = divergence(student, teacher, kind=kind)
    twice = divergence(student.repeat(2, 1), teacher.repeat(2, 1), kind=kind)
    wide = [functional.pad(z, (0, 40), value=-1e4) for z in (student, teacher)]
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(once, divergence(wide[0], wide[1], kind=kind))


def test_forward_kl_at_temperature_1_is_that_of_quantization_aware_training() -> None:
    student, teacher = logits(0).float(), logits(1).float()
    found = divergence(student, teacher, kind="forward-kl")
    torch.testing.assert_close(found, distillation_loss(student, teacher.clone()))


def test_jsd_is_symmetric_and_bounded_at_one_half() -> None:
    far = [100 * logits(seed) for seed in (0, 1)]
    found = divergence(far[0], far[1], kind="jsd", beta=0.5)
    torch.testing.assert_close(found, divergence(far[1], far[0], kind="jsd", beta=0.5))
    assert 0 < float(found) <= math.log(2)


def test_a_token_that_the_teacher_rules_out_costs_nothing_forward() -> None:
    student, teacher = logits(0), logits(1)
    teacher[:, 3] = -torch.inf
    found = divergence(student, teacher, kind="forward-kl")
    known = [z[:, [i for i in range(11) if i != 3]] for z in (student, teacher)]
    lost = student.logsumexp(-1) - known[0].logsumexp(-1)
    torch.testing.assert_close(
        found, divergence(known[0], known[1], kind="forward-kl") + lost.mean()
    )


def test_what_does_not_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="do not compare"):
        divergence(logits(0), logits(1, vocabulary=12), kind="jsd")
    with pytest.raises(ValueError, match="beta"):
        divergence(logits(0), logits(1), kind="jsd", beta=1.0)
    with pytest.raises(ValueError, match="temperature"):
        divergence(logits(0), logits(1), kind="jsd", temperature=0.0)


def test_cross_entropy_is_the_mean_over_counted_rows() -> None:
    tokens = torch.tensor([0, 3, -1, 10, 4, -100, 2])
    kept = tokens >= 0
    expected = Categorical(logits=logits(0)[kept]).log_prob(tokens[kept]).mean()
    torch.testing.assert_close(cross_entropy(logits(0), tokens), -expected)
    flat = torch.zeros(7, 11)
    assert float(cross_entropy(flat, tokens)) == pytest.approx(math.log(11))
    assert float(cross_entropy(flat, torch.full((7,), -1))) == 0.0
    assert cross_entropy(flat.bfloat16(), tokens).dtype == torch.float32


def coarse(student: Tensor, top: TopK, teacher: Tensor, temperature: float) -> Tensor:
    """KL of two distributions over k + 1 outcomes, made one row at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(student)):
        p, q = ((z[row] / temperature).softmax(-1) for z in (teacher, student))
        chosen = top.indices[row]
        rest = [i for i in range(len(p)) if i not in chosen.tolist()]
        ours, theirs = (torch.cat([d[chosen], d[rest].sum()[None]]) for d in (p, q))
        total += kl_divergence(Categorical(probs=ours), Categorical(probs=theirs))
    return total / len(student) * temperature**2


@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mass_beyond_the_top_is_one_outcome(k: int, temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    top = top_k(teacher, k, temperature)
    found = top_k_divergence(student, top, temperature=temperature)
    torch.testing.assert_close(
        found, coarse(student, top, teacher, temperature), rtol=1e-5, atol=1e-6
    )
    whole = divergence(student, teacher, kind="forward-kl", temperature=temperature)
    assert float(found) <= float(whole) + 1e-6


def test_the_whole_vocabulary_is_the_whole_divergence() -> None:
    student, teacher = logits(0), logits(1)
    found = top_k_divergence(student, top_k(teacher, 11, 2.0), temperature=2.0)
    expected = divergence(student, teacher, kind="forward-kl", temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_top_k_has_the_gradient_of_its_value_also_where_nothing_is_left() -> None:
    top = top_k(logits(1), 4, 2.0)
    student = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: top_k_divergence(s, top, temperature=2.0), (student,))
    sure = torch.zeros(3, 50)
    sure[:, :2] = 200.0  # all of the mass, as far as float32 can tell
    student = logits(2, 3, 50).float().requires_grad_()
    loss = top_k_divergence(student, top_k(sure, 2))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert student.grad is not None and bool(student.grad.isfinite().all())
    own = top_k_divergence(sure, top_k(sure, 2))
    assert float(own) == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(ValueError, match="vocabulary"):
        top_k(logits(0), 12)


def test_hidden_states_are_compared_by_direction() -> None:
    student, teacher = logits(0, 7, 8), logits(1, 7, 8)
    cosine = functional.cosine_similarity(student, teacher, dim=-1)
    found = hidden_loss(student, teacher)
    torch.testing.assert_close(found, (2 * (1 - cosine)).mean())
    torch.testing.assert_close(found, hidden_loss(17 * student, teacher / 100))
    assert float(hidden_loss(student, 5 * student)) == pytest.approx(0.0, abs=1e-9)
    assert math.isfinite(float(hidden_loss(torch.zeros(2, 8), torch.ones(2, 8))))


def test_a_projection_takes_states_to_the_teachers_width() -> None:
    student, teacher = logits(0, 7, 4), logits(1, 7, 8)
    projection = logits(2, 8, 4)
    expected = hidden_loss(torch.einsum("rh,Hh->rH", student, projection), teacher)
    torch.testing.assert_close(hidden_loss(student, teacher, projection), expected)
    both = (student.requires_grad_(), projection.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, w: hidden_loss(s, teacher, w), both)
    with pytest.raises(ValueError, match="do not compare"):
        hidden_loss(student, teacher)


def attention(seed: int, heads: int) -> Tensor:
    """Causal rows [2, heads, 5, 5]."""
    scores = logits(seed, 2 * heads * 5, 5).view(2, heads, 5, 5)
    return scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)


def test_attention_rows_are_compared_as_distributions() -> None:
    student, teacher = attention(0, 4), attention(1, 4)
    found = attention_loss(student, teacher)
    expected = functional.kl_div(student.clamp(min=1e-300).log(), teacher, reduction="sum")
    torch.testing.assert_close(found, expected / (2 * 4 * 5))
    assert float(attention_loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [(2, 6), (6, 2), (4, 6)])
def test_heads_that_differ_in_number_are_averaged(ours: int, theirs: int) -> None:
    student, teacher = attention(0, ours), attention(1, theirs)
    pair = [
        torch.stack([part.mean(1) for part in rows.chunk(2, dim=1)], dim=1)
        for rows in (student, teacher)
    ]
    torch.testing.assert_close(attention_loss(student, teacher), attention_loss(pair[0], pair[1]))


def test_attention_has_a_finite_gradient_where_a_student_looks_nowhere() -> None:
    student = attention(0, 1).float()
    student[..., 0] = 0.0
    student.requires_grad_()
    loss = attention_loss(student, attention(1, 1))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert student.grad is not None and bool(student.grad.isfinite().all())
