"""What is lost on a batch, against plain formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.distillation.cache import TeacherCache, fill_cache
from infopt.core.distillation.learner import Student, counted_positions
from infopt.core.distillation.teacher import show_attention
from infopt.core.models.hf import load_transformers
from infopt.core.recipe.distill import DistillSettings
from infopt.core.training.loop import Recomputing, Stepping

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]
TOKENS = torch.randint(1, 256, (3, 17), generator=torch.Generator().manual_seed(0))


def settings(**changes: Any) -> DistillSettings:
    values = {"student": "other", "steps": 2, "sequence_length": 16, "batch_tokens": 64}
    return DistillSettings.model_validate({**values, "micro_tokens": 64, **changes})


@pytest.fixture
def teacher(make_llama: MakeLlama) -> PreTrainedModel:
    return load_transformers(make_llama("teacher"), torch.float32, CPU)


@pytest.fixture
def student(make_llama: MakeLlama) -> PreTrainedModel:
    """Half as wide and half as deep as the teacher, its weights its own."""
    artifact = make_llama(
        "student", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    return load_transformers(artifact, torch.float32, CPU)


def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(input_ids=tokens[:, :-1]).logits
    return found.detach().double().flatten(0, 1)


def kl(one: Tensor, other: Tensor, temperature: float = 1.0) -> float:
    """KL(one || other) at a temperature, times its square, the mean over rows."""
    target = (one / temperature).log_softmax(-1)
    ours = (other / temperature).log_softmax(-1)
    found = F.kl_div(ours, target, log_target=True, reduction="sum")
    return float(found) / len(one) * temperature**2


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-7)


def test_the_divergence_and_its_share(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    own, wanted = logits(student), logits(teacher)
    plain = Student(student, settings(), teacher=teacher).loss(TOKENS)
    assert set(plain) == {"loss", "divergence"}
    assert float(plain["loss"]) == float(plain["divergence"]) == close(kl(wanted, own))
    warm = Student(student, settings(temperature=3.0), teacher=teacher).loss(TOKENS)
    assert float(warm["loss"]) == close(kl(wanted, own, 3.0))
    back = Student(student, settings(loss="reverse-kl"), teacher=teacher).loss(TOKENS)
    assert float(back["loss"]) == close(kl(own, wanted))
    mixed = Student(student, settings(alpha=0.25), teacher=teacher).loss(TOKENS)
    hard = float(F.cross_entropy(own, TOKENS[:, 1:].flatten()))
    assert float(mixed["cross_entropy"]) == close(hard)
    assert float(mixed["loss"]) == close(0.25 * kl(wanted, own) + 0.75 * hard)
    alone = Student(student, settings(alpha=0.0)).loss(TOKENS)
    assert float(alone["loss"]) == close(hard) and set(alone) == {"loss", "cross_entropy"}


def test_a_model_has_nothing_to_learn_from_itself(teacher: PreTrainedModel) -> None:
    show_attention(teacher)
    every = settings(hidden_weight=1.0, attention_weight=1.0)
    learner = Student(teacher, every, teacher=teacher)
    parts = {name: float(value) for name, value in learner.loss(TOKENS).items()}
    assert set(parts) == {"loss", "divergence", "hidden", "attention"}
    assert all(abs(value) < 1e-6 for value in parts.values())
    assert not [name for name in learner.parameters() if name.startswith("projection")]


def test_states_are_matched_through_projections_that_learn(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    show_attention(teacher)
    show_attention(student)
    every = settings(hidden_weight=2.0, attention_weight=3.0)
    learner = Student(student, every, teacher=teacher)
    assert learner.parameters()["projection.1"].shape == (64, 32)
    parts = learner.loss(TOKENS)
    total = parts["divergence"] + 2 * parts["hidden"] + 3 * parts["attention"]
    assert float(parts["loss"]) == close(float(total))
    parts["loss"].backward()
    assert all(value.grad is not None for value in learner.parameters().values())
    assert all(value.grad is None for value in teacher.parameters())
    ours = student(input_ids=TOKENS[:, :-1], output_hidden_states=True).hidden_states[1]
    theirs = teacher(input_ids=TOKENS[:, :-1], output_hidden_states=True).hidden_states[2]
    wide = ours @ learner.parameters()["projection.1"].T
    assert float(parts["hidden"]) == close(
        float((2 - 2 * F.cosine_similarity(wide, theirs, dim=-1)).mean() / 1.0)
    )
    maps = [
        model(input_ids=TOKENS[:, :-1], output_attentions=True).attentions[-1]
        for model in (student, teacher)
    ]
    p, q = maps[1].unflatten(1, (2, 2)).mean(2), maps[0]
    rows = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
    assert float(parts["attention"]) == close(float(rows.mean()))


def test_kept_logits_teach_as_live_ones(
    teacher: PreTrainedModel, student: PreTrainedModel, tmp_path: Path
) -> None:
    live = float(Student(student, settings(temperature=2.0), teacher=teacher).loss(TOKENS)["loss"])
    losses = []
    for k in (1, 16, 256):
        fill_cache(
            tmp_path / str(k),
            TOKENS,
            lambda tokens: teacher(input_ids=tokens).logits,
            k=k,
            temperature=2.0,
        )
        cache = TeacherCache(tmp_path / str(k), TOKENS)
        learner = Student(student, settings(temperature=2.0, top_k=k), cache=cache)
        losses.append(float(learner.loss(TOKENS.flip(0))["loss"]))
    assert losses[2] == close(live) and losses[0] < losses[1] < losses[2]


def test_which_positions_count() -> None:
    tokens = torch.tensor([[5, 6, 7, 1, 8, 9, 1, 4], [5, 6, 7, 8, 9, 9, 1, -1]])
    ends = torch.tensor([1])
    found = counted_positions(tokens, torch.tensor([True, False]), 4, ends)
    # An end within what was given ends nothing; that of what was written counts, and no more.
    assert found.tolist() == [[False] * 3 + [True] * 3 + [False], [True] * 6 + [False]]
    none = torch.tensor([], dtype=torch.int64)
    found = counted_positions(tokens, torch.tensor([True, True]), 4, none)
    assert found.tolist() == [[False] * 3 + [True] * 4, [False] * 3 + [True] * 3 + [False]]


def test_of_what_the_teacher_wrote_that_alone_counts(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    learner = Student(student, settings(sequence_level=True), teacher=teacher)
    own, wanted = (logits(m).unflatten(0, (3, 16))[:, 7:].flatten(0, 1) for m in (student, teacher))
    assert float(learner.loss(TOKENS)["loss"]) == close(kl(wanted, own))


def test_on_policy_text_is_judged_and_not_copied(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    own = TOKENS.clone()
    own[:, 8:] = 77
    asked: list[tuple[Tensor, list[int]]] = []

    def write(windows: Tensor, seeds: list[int]) -> Tensor:
        asked.append((windows, seeds))
        return own[: len(windows)]

    every = settings(on_policy=1.0, alpha=0.5)
    learner = Student(student, every, teacher=teacher, write=write)
    learner.at_step(3)
    parts = learner.loss(TOKENS)
    assert float(parts["cross_entropy"]) == 0.0
    rows = [logits(m, own).unflatten(0, (3, 16))[:, 7:].flatten(0, 1) for m in (teacher, student)]
    assert float(parts["divergence"]) == close(kl(*rows))
    assert torch.equal(asked[0][0], TOKENS) and len(set(asked[0][1])) == 3
    learner.loss(TOKENS)
    learner.at_step(3)
    learner.loss(TOKENS)
    assert asked[1][1] != asked[0][1] == asked[2][1]
    assert torch.equal(TOKENS[:, :8], own[:, :8]), "the windows themselves are left alone"


def test_it_steps_and_recomputes_as_the_loop_wants(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    learner = Student(student, settings(hidden_weight=1.0), teacher=teacher)
    assert isinstance(learner, Stepping) and isinstance(learner, Recomputing)
    learner.loss(TOKENS)["loss"].backward()
    before = {name: value.grad.clone() for name, value in learner.parameters().items()}
    student.zero_grad()
    for value in learner.parameters().values():
        value.grad = None
    learner.recompute()
    learner.loss(TOKENS)["loss"].backward()
    for name, value in learner.parameters().items():
        assert torch.equal(value.grad, before[name]), name
