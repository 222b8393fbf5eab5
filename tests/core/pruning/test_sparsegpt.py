import pytest
import torch
from torch import Tensor

from infopt.core.compression.statistics import relative_error
from infopt.core.pruning.magnitude import magnitude_mask
from infopt.core.pruning.sparsegpt import sparsegpt
from infopt.core.pruning.wanda import wanda_mask
from infopt.core.recipe.prune import Pattern, parse_pattern

ROWS, COLUMNS = 24, 32


def problem(seed: int = 0, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(400, columns, generator=generator) @ mixing
    weight = torch.randn(ROWS, columns, generator=generator)
    return weight, 2 * x.T @ x / len(x)


def by_elimination(
    weight: Tensor, hessian: Tensor, pattern: Pattern, block: int, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The optimal brain surgeon's update column by column, in float64, with a true inverse whose
    rows are eliminated one by one; no Cholesky factor."""
    w, h = weight.double().clone(), hessian.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h)).double())
    inverses, pivots = [], []
    for _ in range(w.shape[1]):
        inverses.append(inverse[0].clone())
        pivots.append(inverse[0, 0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    pivot = torch.stack(pivots)
    mask = torch.ones_like(w, dtype=torch.bool)
    for column in range(w.shape[1]):
        if pattern.of is not None and pattern.kept is not None and column % pattern.of == 0:
            part = slice(column, column + pattern.of)
            order = (w[:, part].square() / pivot[part]).argsort(dim=1)
            gone = order[:, : pattern.of - pattern.kept] + column
            mask.scatter_(1, gone, False)
        elif pattern.of is None and column % block == 0:
            part = slice(column, column + block)
            scores = w[:, part].square() / pivot[part]
            count = int(pattern.share * scores.numel())
            border = scores.flatten().sort().values[count - 1]
            mask[:, part] = scores > border
        error = torch.where(mask[:, column], 0.0, w[:, column]) / pivot[column]
        w[:, column:] -= torch.outer(error, inverses[column])
    return w * mask, mask


@pytest.mark.parametrize(
    ("word", "block"), [("2:4", 8), ("2:4", 32), ("1:8", 8), ("0.5", 8), ("0.25", 16), ("0.5", 32)]
)
def test_it_is_elimination_column_by_column(word: str, block: int) -> None:
    weight, hessian = problem()
    pattern = parse_pattern(word)
    found = sparsegpt(weight, hessian, pattern, block=block)
    wanted, mask = by_elimination(weight, hessian, pattern, block)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, wanted.float(), rtol=2e-3, atol=2e-3)
    assert (found.weight[~found.mask] == 0).all()
    assert found.damp == 0.01 and found.fallback is None


def test_how_columns_are_blocked_changes_no_group() -> None:
    weight, hessian = problem(columns=48)
    pattern = parse_pattern("2:4")
    whole = sparsegpt(weight, hessian, pattern, block=48)
    for block in (4, 10, 16, 1000):
        part = sparsegpt(weight, hessian, pattern, block=block)
        assert torch.equal(part.mask, whole.mask)
        torch.testing.assert_close(part.weight, whole.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("columns", [32, 40, 7])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
def test_the_share_is_exact_in_all(columns: int, share: float) -> None:
    weight, hessian = problem(columns=columns)
    found = sparsegpt(weight, hessian, Pattern(share), block=16)
    assert int((~found.mask).sum()) == int(share * ROWS * columns + 1e-9)


def test_what_is_left_makes_up_for_the_first_columns_as_well_as_anything_can() -> None:
    """With the first columns removed and all others kept, it is the solution of least squares."""
    weight, hessian = problem()
    weight[:, :4] *= 1e-2  # so that they are what goes: no other weight is below 1
    weight[:, 4:] = weight[:, 4:].sign() + weight[:, 4:]
    share = 4 / COLUMNS
    found = sparsegpt(weight, hessian, Pattern(share), block=COLUMNS)
    assert not found.mask[:, :4].any() and found.mask[:, 4:].all()
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(COLUMNS).double()
    # Of all q with q_first = 0, (w - q) H (w - q)^T is least where (w - q) H is 0 on the rest.
    wanted = weight.double()[:, 4:] + weight.double()[:, :4] @ h[:4, 4:] @ h[4:, 4:].inverse()
    moved = (wanted - weight.double()[:, 4:]).abs().max()
    assert moved > 1e-2, "there is something to make up for"
    torch.testing.assert_close(found.weight[:, 4:].double(), wanted, rtol=0, atol=1e-3 * moved)


def test_inputs_that_have_nothing_in_common_correct_nothing() -> None:
    weight, _ = problem()
    diagonal = torch.diag(torch.linspace(0.5, 4, COLUMNS))
    found = sparsegpt(weight, diagonal, parse_pattern("2:4"))
    damped = diagonal.diagonal() + 0.01 * diagonal.diagonal().mean()
    assert torch.equal(found.mask, wanda_mask(weight, torch.diag(damped), parse_pattern("2:4")))
    assert torch.equal(found.weight, weight * found.mask)


@pytest.mark.parametrize("word", ["0.5", "2:4"])
@pytest.mark.parametrize("seed", range(4))
def test_errors_have_the_order_of_the_papers(word: str, seed: int) -> None:
    """Where inputs have much in common, as in real layers, others can make up for a loss."""
    generator = torch.Generator().manual_seed(seed)
    columns = 128
    mixing = torch.randn(columns // 4, columns, generator=generator)
    x = torch.randn(2000, columns // 4, generator=generator) @ mixing
    x = x + torch.randn(2000, columns, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.2
    weight, hessian = torch.randn(ROWS, columns, generator=generator), 2 * x.T @ x / len(x)
    pattern = parse_pattern(word)
    ours = relative_error(weight, sparsegpt(weight, hessian, pattern, block=32).weight, hessian)
    wanda = relative_error(weight, weight * wanda_mask(weight, hessian, pattern), hessian)
    plain = relative_error(weight, weight * magnitude_mask(weight, pattern), hessian)
    assert ours < 0.5 * wanda < 0.5 * plain


def test_inputs_that_are_always_zero_lose_their_weights_first() -> None:
    weight, hessian = problem()
    weight[:, [3, 9]] = 100.0
    hessian[[3, 9]] = 0
    hessian[:, [3, 9]] = 0
    found = sparsegpt(weight, hessian, Pattern(0.5))
    assert not found.mask[:, [3, 9]].any()
    assert torch.isfinite(found.weight).all()
    assert int((~found.mask).sum()) == ROWS * COLUMNS // 2


def test_without_a_factor_it_is_wanda_and_says_so() -> None:
    weight, _ = problem(columns=4)
    hopeless = torch.full((4, 4), 10.0)
    hopeless.fill_diagonal_(1.0)
    found = sparsegpt(weight, hopeless, parse_pattern("2:4"))
    assert found.fallback == "wanda: the Hessian has no Cholesky factor"
    assert torch.equal(found.weight, weight * wanda_mask(weight, hopeless, parse_pattern("2:4")))
    silent = sparsegpt(weight, torch.zeros(4, 4), parse_pattern("2:4"))
    assert silent.fallback == "wanda: no input but zeros reached this layer"
    assert int((~silent.mask).sum()) == weight.numel() // 2
