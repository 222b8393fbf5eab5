import pytest
import torch
from torch import Tensor
from torch.nn import functional

from infopt.core.training import distillation
from infopt.core.training.distillation import distillation_loss


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))


def reference(student: Tensor, teacher: Tensor, tokens: Tensor, hard: float) -> Tensor:
    """As torch has it."""
    soft = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return (1 - hard) * soft + hard * functional.cross_entropy(student, tokens, ignore_index=-1)


@pytest.mark.parametrize("hard", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1 << 20, 4 * 11 * 2])
def test_loss_and_gradient_are_those_of_torch(
    hard: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK_BYTES", chunk)
    tokens = torch.tensor([0, 3, -1, 10, 4, -1, 2])
    ours, theirs = (logits(0).requires_grad_() for _ in range(2))
    found = distillation_loss(ours, logits(1), tokens, hard)
    expected = reference(theirs, logits(1), tokens, hard)
    (2 * found).backward()
    (2 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_equal_logits_cost_nothing() -> None:
    ours = logits(0).requires_grad_()
    loss = distillation_loss(ours, logits(0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert ours.grad is not None
    assert float(ours.grad.abs().max()) < 1e-6
