import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from infopt.core.compression import training
from infopt.core.compression.training import (
    TrainingState,
    cosine_rate,
    distillation_loss,
    load_state,
    save_state,
    windows_of_step,
)
from infopt.core.errors import ResumeError

IDENTITY = {"model": "a", "seed": "0"}


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
    monkeypatch.setattr(training, "_CHUNK_BYTES", chunk)
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


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [cosine_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001
    assert cosine_rate(0, 1, 0) == 1.0


def test_every_window_comes_once_a_round_in_a_new_order() -> None:
    seen = [windows_of_step(step, 2, 6, seed=5) for step in range(6)]
    first, second = ([w for step in part for w in step] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert windows_of_step(4, 2, 6, seed=5) == seen[4], "a step needs no memory of those before"
    assert windows_of_step(4, 2, 6, seed=500) != seen[4]


def state(step: int) -> TrainingState:
    return TrainingState(step, {"a": torch.full((3,), float(step))}, [0.5] * step)


def test_a_state_comes_back_and_the_one_before_is_gone(tmp_path: Path) -> None:
    assert load_state(tmp_path / "new", IDENTITY) is None
    for step in (2, 4):
        save_state(tmp_path, IDENTITY, state(step))
    found = load_state(tmp_path, IDENTITY)
    assert found is not None
    assert (found.step, found.losses) == (4, [0.5] * 4)
    assert torch.equal(found.tensors["a"], torch.full((3,), 4.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "CURRENT",
        "state-000004.safetensors",
    ]


def test_a_kill_while_writing_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, IDENTITY, state(2))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_atomically", killed)
        save_state(tmp_path, IDENTITY, state(4))
    found = load_state(tmp_path, IDENTITY)
    assert found is not None and found.step == 2


def test_other_work_or_damage_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, IDENTITY, state(2))
    with pytest.raises(ResumeError, match="another seed"):
        load_state(tmp_path, IDENTITY | {"seed": "1"})
    file = tmp_path / json.loads((tmp_path / "CURRENT").read_text())["file"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ResumeError, match="damaged"):
        load_state(tmp_path, IDENTITY)
    (tmp_path / "CURRENT").write_text("[]")
    with pytest.raises(ResumeError, match="damaged"):
        load_state(tmp_path, IDENTITY)
