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
from infopt.core.training.data import Windows
from infopt.core.training.loop import Counting, Recomputing, Stepping, train

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
    assert torch.equal(plain["loss"], plain["divergence"])
    assert float(plain["loss"].detach()) == close(kl(wanted, own))
    warm = Student(student, settings(temperature=3.0), teacher=teacher).loss(TOKENS)
    assert warm["loss"].item() == close(kl(wanted, own, 3.0))
    back = Student(student, settings(loss="reverse-kl"), teacher=teacher).loss(TOKENS)
    assert back["loss"].item() == close(kl(own, wanted))
    mixed = Student(student, settings(alpha=0.25), teacher=teacher).loss(TOKENS)
    hard = float(F.cross_entropy(own, TOKENS[:, 1:].flatten()))
    assert mixed["cross_entropy"].item() == close(hard)
    assert mixed["loss"].item() == close(0.25 * kl(wanted, own) + 0.75 * hard)
    alone = Student(student, settings(alpha=0.0)).loss(TOKENS)
    assert alone["loss"].item() == close(hard) and set(alone) == {"loss", "cross_entropy"}


def test_a_model_has_nothing_to_learn_from_itself(teacher: PreTrainedModel) -> None:
    show_attention(teacher)
    every = settings(hidden_weight=1.0, attention_weight=1.0)
    learner = Student(teacher, every, teacher=teacher)
    parts = {name: value.item() for name, value in learner.loss(TOKENS).items()}
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
    assert parts["loss"].item() == close(total.item())
    parts["loss"].backward()
    assert all(value.grad is not None for value in learner.parameters().values())
    assert all(value.grad is None for value in teacher.parameters())
    ours = student(input_ids=TOKENS[:, :-1], output_hidden_states=True).hidden_states[1]
    theirs = teacher(input_ids=TOKENS[:, :-1], output_hidden_states=True).hidden_states[2]
    wide = ours @ learner.parameters()["projection.1"].T
    cosine = F.cosine_similarity(wide, theirs, dim=-1).mean().item()
    assert parts["hidden"].item() == close(2 - 2 * cosine)
    maps = [
        model(input_ids=TOKENS[:, :-1], output_attentions=True).attentions[-1]
        for model in (student, teacher)
    ]
    p, q = maps[1].unflatten(1, (2, 2)).mean(2), maps[0]
    rows = torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
    assert parts["attention"].item() == close(rows.mean().item())


def test_kept_logits_teach_as_live_ones(
    teacher: PreTrainedModel, student: PreTrainedModel, tmp_path: Path
) -> None:
    live = Student(student, settings(temperature=2.0), teacher=teacher).loss(TOKENS)["loss"].item()
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
        losses.append(learner.loss(TOKENS.flip(0))["loss"].item())
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
    assert learner.loss(TOKENS)["loss"].item() == close(kl(wanted, own))


def test_the_mean_is_over_all_that_counts_however_a_batch_is_split(
    make_llama: MakeLlama, teacher: PreTrainedModel
) -> None:
    """Windows that end early have fewer tokens in the mean, and none of them weighs more."""
    rows = TOKENS[:, :16].clone()
    rows[0, 9], rows[1, 14] = 0, 0  # the end of text; of the halves 8 to 15, 2, 7 and 8 count
    windows = Windows(rows, rows[:0], "text", "")
    wanted = settings(sequence_level=True, alpha=0.5, steps=1, batch_tokens=48, micro_tokens=48)
    found = []
    for micro in (48, 16):
        student = load_transformers(make_llama("one", num_hidden_layers=1), torch.float32, CPU)
        learner = Student(student, wanted, teacher=teacher, ends=[0])
        how = wanted.train.model_copy(update={"micro_tokens": micro, "precision": "float32"})
        result = train(learner, windows, how, seed=0, device=CPU, identity={}, folder=None)
        grads = [value.grad for value in learner.parameters().values()]
        found.append((result, torch.cat([grad.flatten() for grad in grads if grad is not None])))
    assert [result.tokens for result, _ in found] == [2 + 7 + 8] * 2
    for name, value in found[0][0].losses[0].items():
        assert found[1][0].losses[0][name] == close(value)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-7)


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
    assert parts["cross_entropy"].item() == 0.0
    rows = [logits(m, own).unflatten(0, (3, 16))[:, 7:].flatten(0, 1) for m in (teacher, student)]
    assert parts["divergence"].item() == close(kl(*rows))
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
    for able in (Stepping, Recomputing, Counting):
        assert isinstance(learner, able)
    learner.loss(TOKENS)["loss"].backward()
    before = {name: value.grad.clone() for name, value in learner.parameters().items()}
    student.zero_grad()
    for value in learner.parameters().values():
        value.grad = None
    learner.recompute()
    learner.loss(TOKENS)["loss"].backward()
    for name, value in learner.parameters().items():
        assert torch.equal(value.grad, before[name]), name
