"""The loop beside a plain one, its state through kills, its ends."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from infopt.core.errors import NumericsError, ResumeError, UnsupportedError, UsageError
from infopt.core.progress import Progress
from infopt.core.recipe.train import TrainSettings
from infopt.core.training import loop
from infopt.core.training.data import Windows, split_windows
from infopt.core.training.loop import TrainResult, train
from infopt.core.training.schedule import cosine_rate, windows_of_step

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    steps=6,
    learning_rate=0.05,
    batch_tokens=36,
    micro_tokens=18,
    sequence_length=9,
    weight_decay=0.1,
    save_every=2,
    precision="float32",
)


class Bigrams:
    """Predicts a token from the one before it, through a matrix, a vector and a table."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # Of a strange order in memory, as a Conv1D's weight.
        shapes = {"table": (8, 16), "matrix": (16, 8), "vector": (16,)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        made["table"] = made["table"].T
        self.learned = {name: nn.Parameter(value / 4) for name, value in made.items()}
        self.updates = 0

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.learned

    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        states = self.learned["table"][tokens[:, :-1].clamp(min=0)]
        logits = states @ self.learned["matrix"].T + self.learned["vector"]
        follow = tokens[:, 1:].flatten()
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), follow, ignore_index=-1)
        return {"loss": loss, "twice": 2 * loss}

    def after_step(self) -> None:
        self.updates += 1


def some_windows(*, uneven: bool = False) -> Windows:
    rows = torch.randint(16, (12, 9), generator=torch.Generator().manual_seed(1))
    if uneven:
        for number, row in enumerate(rows):
            row[4 + number % 5 :] = -1
    return split_windows(rows, "random", 0)


def run(learner: Any = None, settings: TrainSettings = SETTINGS, **options: Any) -> TrainResult:
    given: dict[str, Any] = {"seed": 3, "device": CPU, "identity": {"a": "b"}, "folder": None}
    windows = options.pop("windows", None) or some_windows()
    return train(learner or Bigrams(), windows, settings, **(given | options))


def changed(**values: Any) -> TrainSettings:
    return SETTINGS.model_copy(update=values)


def equal(first: Bigrams, second: Bigrams) -> bool:
    pairs = zip(first.learned.values(), second.learned.values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("uneven", [False, True])
def test_it_is_adamw_on_a_cosine_over_whole_batches(uneven: bool) -> None:
    """Batches in parts, weighted by what counts, beside a plain loop over whole ones."""
    ours, plain, windows = Bigrams(), Bigrams(), some_windows(uneven=uneven)
    result = run(ours, windows=windows)
    groups = [
        {"params": [plain.learned["table"], plain.learned["matrix"]], "weight_decay": 0.1},
        {"params": [plain.learned["vector"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(6):
        rows = windows.train[windows_of_step(step, 4, len(windows.train), 3)]
        optimizer.zero_grad()
        loss = plain.loss(rows)["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(plain.learned.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * cosine_rate(step, 6, 1)
        optimizer.step()
        found = result.losses[step]
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert found["twice"] == pytest.approx(2 * found["loss"])
        assert found["gradient"] == pytest.approx(float(norm), rel=1e-4)
    for name, value in plain.learned.items():
        torch.testing.assert_close(ours.learned[name], value, rtol=1e-4, atol=1e-6)
    assert (result.steps, ours.updates, result.resumed, result.stopped) == (6, 6, 0, None)
    assert uneven or result.tokens == 6 * 4 * 8
    assert result.seconds > 0


def test_training_lowers_the_loss() -> None:
    rows = (torch.arange(9) + torch.arange(12)[:, None]) % 16
    result = run(settings=changed(steps=120), windows=split_windows(rows, "counting", 0))
    assert result.losses[0]["loss"] > 2.5
    assert result.losses[-1]["loss"] < 0.1


class Stop:
    """Ctrl-C as the progress of a step is shown."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if progress.done == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("patience", [None, 2])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    step: int, patience: int | None, tmp_path: Path
) -> None:
    settings = changed(patience=patience)
    measures = [5.0, 4.0, 3.0, 4.0, 2.0, 6.0, 7.0]

    def evaluate(learner: Bigrams) -> Callable[[], float]:
        return lambda: measures[learner.updates] + float(learner.learned["vector"][0].detach())

    whole = Bigrams()
    expected = run(whole, settings, evaluate=evaluate(whole))
    cut = Bigrams()
    with pytest.raises(KeyboardInterrupt):
        stop = Stop(step)
        run(cut, settings, folder=tmp_path, evaluate=evaluate(cut), progress=stop)
    again, seen = Bigrams(), Stop(-1)
    again.updates = step  # its measure goes by it
    found = run(again, settings, folder=tmp_path, evaluate=evaluate(again), progress=seen)
    assert seen.seen[0].done == seen.seen[0].resumed == found.resumed == step
    assert seen.seen[-1].done == 6
    assert found.losses == expected.losses
    assert found.held_out == expected.held_out and len(found.held_out) == 7
    assert found.tokens == expected.tokens
    assert equal(again, whole)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}, "no pickle"
    finished = Bigrams()
    once_more = run(finished, settings, folder=tmp_path, evaluate=lambda: math.nan)
    assert once_more.resumed == once_more.steps == 6 and equal(finished, whole)


def test_a_kill_costs_what_came_after_the_last_save(tmp_path: Path) -> None:
    """As if the power failed: nothing more is written."""
    whole, cut, again = Bigrams(), Bigrams(), Bigrams()
    run(whole)

    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        if progress.done == 5:
            raise Killed

    with pytest.raises(Killed):
        run(cut, folder=tmp_path, progress=kill)
    assert run(again, folder=tmp_path).resumed == 4
    assert equal(again, whole)


def test_half_an_update_is_never_kept(tmp_path: Path) -> None:
    class Cut(Bigrams):
        def after_step(self) -> None:
            super().after_step()
            if self.updates == 4:
                raise KeyboardInterrupt

    whole, again = Bigrams(), Bigrams()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(Cut(), folder=tmp_path)
    assert run(again, folder=tmp_path).resumed == 2
    assert equal(again, whole)


def test_other_work_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(folder=tmp_path)
    with pytest.raises(ResumeError, match="another training learning_rate"):
        run(settings=changed(learning_rate=0.1), folder=tmp_path)
    with pytest.raises(ResumeError, match="another training seed"):
        run(folder=tmp_path, seed=4)
    with pytest.raises(ResumeError, match="another training windows"):
        run(folder=tmp_path, windows=some_windows(uneven=True))
    with pytest.raises(ResumeError, match="another a"):
        run(folder=tmp_path, identity={"a": "c"})


def scripted(values: list[float]) -> Callable[[], float]:
    found: Iterator[float] = iter(values)
    return lambda: next(found)


def test_it_looks_at_the_held_out_text_before_meanwhile_and_at_the_end() -> None:
    result = run(settings=changed(steps=5, evaluate_every=2), evaluate=scripted([4, 3, 2, 1]))
    assert result.held_out == [(0, 4), (2, 3), (4, 2), (5, 1)]


def test_it_stops_where_nothing_gets_better_and_goes_back_to_the_best() -> None:
    best, stopped = Bigrams(), Bigrams()
    run(best, changed(steps=30), progress=lambda p: None)
    measures = scripted([5, 4, 3, 3.5, 3.1, 9, 9])
    result = run(
        stopped, changed(steps=30, evaluate_every=1, patience=2), evaluate=measures, folder=None
    )
    assert result.steps == 4 and result.stopped == "no better since step 2"
    two = Bigrams()
    with pytest.raises(KeyboardInterrupt):
        run(two, changed(steps=30), progress=Stop(2))
    assert equal(stopped, two)
    assert not equal(stopped, best)


def test_without_patience_the_last_is_kept() -> None:
    plain, measured = Bigrams(), Bigrams()
    run(plain)
    run(measured, evaluate=scripted([1, 2, 3, 4, 5, 6, 7]))
    assert equal(plain, measured)


class Poisoned(Bigrams):
    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        parts = dict(super().loss(tokens))
        if self.updates == 2:
            parts["twice"] = parts["twice"] * torch.nan
        return parts


def test_what_is_not_finite_names_part_and_step() -> None:
    with pytest.raises(NumericsError, match="the twice of step 3 is not finite"):
        run(Poisoned())
    with pytest.raises(NumericsError, match="measures nan after step 0"):
        run(evaluate=lambda: math.nan)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    class Steep(Bigrams):
        def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
            return {"loss": self.learned["vector"].clamp(max=0).abs().sqrt().sum()}

    learner = Steep()
    before = [value.detach().clone() for value in learner.learned.values()]
    with torch.no_grad():
        learner.learned["vector"][0] = 0.0
        before[2][0] = 0.0
    with pytest.raises(NumericsError, match="the gradient of step 1"):
        run(learner)
    for value, old in zip(learner.learned.values(), before, strict=True):
        assert torch.equal(value, old)


def test_a_learner_may_know_the_step_and_may_recompute() -> None:
    class Able(Bigrams):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []
            self.recomputes = False

        def at_step(self, step: int) -> None:
            self.steps.append(step)

        def recompute(self) -> None:
            self.recomputes = True

    learner = Able()
    run(learner, changed(gradient_checkpointing=True))
    assert learner.steps == list(range(6)) and learner.recomputes
    with pytest.raises(UnsupportedError, match="activations"):
        run(settings=changed(gradient_checkpointing=True))
    with pytest.raises(UsageError, match="patience"):
        run(settings=changed(patience=1))


def test_bfloat16_computes_in_it_and_learns_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Watched(Bigrams):
        def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
            seen.append((self.learned["table"] @ self.learned["matrix"].T).dtype)
            return super().loss(tokens)

    half, full = Watched(), Bigrams()
    run(half, changed(precision="bfloat16"))
    run(full)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in half.learned.values()} == {torch.float32}
    assert not equal(half, full)
    for name, value in full.learned.items():
        torch.testing.assert_close(half.learned[name], value, rtol=0.1, atol=0.1)


def test_auto_is_what_the_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, expected in [
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float32),
    ]:
        monkeypatch.setattr(loop, "choose_dtype", lambda word, device, known=known: known)
        assert loop.precision_of(TrainSettings(steps=1), CPU) == expected
        assert loop.precision_of(SETTINGS, CPU) == torch.float32
