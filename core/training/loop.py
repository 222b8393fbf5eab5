"""The training loop: AdamW on a cosine, batches in parts, a state that a kill does not cost."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.hardware.choose import choose_dtype
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.train import TrainSettings
from infopt.core.training.data import Windows
from infopt.core.training.devices import Group, process_group
from infopt.core.training.schedule import cosine_rate, windows_of_step
from infopt.core.training.state import TrainingState, load_state, save_state

_BETAS = (0.9, 0.95)
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's, of each parameter: one that a step did not use, as an expert's, was not counted then."""
_VALUE, _BEST = "value", "best"


class Learner(Protocol):
    """What is trained."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What learns, in float32, each once, by names that last."""

    def loss(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """Of windows int64 [n, length] the scalar `loss`, a mean over what counts; others are
        shown."""

    def after_step(self) -> None:
        """Called after each update, such as to hold a mask."""


@runtime_checkable
class Stepping(Protocol):
    """A learner whose losses depend on the step, such as by the seed of what it samples."""

    def at_step(self, step: int) -> None:
        """Called before the losses of the step, which counts from 0."""


@runtime_checkable
class Counting(Protocol):
    """A learner that leaves out tokens of its windows, such as those behind an end of text."""

    def counted(self) -> int:
        """The tokens that the last loss was a mean over."""


@runtime_checkable
class Recomputing(Protocol):
    """A learner that can do without the activations of its blocks."""

    def recompute(self) -> None:
        """Called once: from now on they are computed again in the backward pass."""


@dataclass
class TrainResult:
    """How a training went, from its first step on; `resumed` of its steps were done before.

    losses: the parts of the loss of each step, and `gradient`, its norm before it was clipped.
    held_out: (steps done, what was measured). tokens: seen in all. stopped: why before the end.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    resumed: int = 0


@torch.enable_grad()
def train(
    learner: Learner,
    windows: Windows,
    settings: TrainSettings,
    *,
    seed: int,
    device: torch.device,
    identity: Mapping[str, str],
    folder: Path | None,
    evaluate: Callable[[], float] | None = None,
    progress: ProgressCallback = silent,
) -> TrainResult:
    """Train in place on `device`, where the learner is already.

    `evaluate` measures the held-out text (less is better) before the first step, at every
    `evaluation_interval` and at the end; with `patience` the learner is left at its best. With a
    `folder` the state is made durable there every `save_every` steps, at the end and on Ctrl-C, and
    taken up from there: on the same machine, with as many processes, to the same bits. `identity`
    names what the caller's work depends on. Under torchrun every process calls this with the same
    arguments and sees the same folder; the first of them evaluates and writes.

    Raises NumericsError for a loss or gradient that is not finite, naming the step; ResumeError for
    a state of other work; UsageError for settings that cannot be met.
    """
    if settings.patience is not None and evaluate is None:
        raise UsageError("patience needs a measure of the held-out text", "leave patience away")
    if settings.gradient_checkpointing:
        if not isinstance(learner, Recomputing):
            raise UnsupportedError(
                "this training cannot compute activations again",
                "leave gradient_checkpointing away",
            )
        learner.recompute()
    with process_group(device) as group:
        run = _Run(learner, windows, settings, seed, device, group)
        whole = {**identity, **run.identity()}
        if folder is not None and (state := load_state(folder, whole)) is not None:
            run.restore(state)
        store = None if folder is None else lambda: save_state(folder, whole, run.state())
        if group.leads:
            _go(run, store, evaluate, progress)
        else:
            _go(run, None, evaluate, silent)
    return run.result


def precision_of(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """What is computed in: of `auto` bfloat16 where the device computes it, else float32."""
    if settings.precision == "auto":
        known = choose_dtype("auto", device.type)
        return torch.bfloat16 if known == "bfloat16" else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def _go(
    run: "_Run",
    store: Callable[[], None] | None,
    evaluate: Callable[[], float] | None,
    progress: ProgressCallback,
) -> None:
    """All that is left to do. Of a step in which Ctrl-C came nothing is kept."""
    result, settings = run.result, run.settings
    saved = result.resumed = result.steps
    try:
        while True:
            if evaluate is not None and run.evaluation_is_due():
                run.measure(evaluate)
            ended = result.stopped is not None or result.steps == settings.steps
            due = ended or result.steps % settings.save_every == 0
            if store is not None and due and result.steps != saved:
                store()
                saved = result.steps
            progress(Progress("training", result.steps, settings.steps, run.note(), result.resumed))
            if ended:
                break
            run.advance()
    except KeyboardInterrupt:
        if store is not None and run.whole and result.steps != saved:
            store()
        raise
    run.return_to_best()


class _Run:
    """A training at some step."""

    def __init__(
        self,
        learner: Learner,
        windows: Windows,
        settings: TrainSettings,
        seed: int,
        device: torch.device,
        group: Group,
    ) -> None:
        self.learner, self.windows, self.settings = learner, windows, settings
        self.seed, self.device, self.group = seed, device, group
        self.learned = dict(learner.parameters())
        self.result = TrainResult()
        self.whole = True
        """Whether parameters and moments are of one step: not while an update is on its way."""
        self._best: dict[str, Tensor] = {}
        self._precision = precision_of(settings, device)
        self._optimizer = _optimizer(self.learned, settings)
        self._since = time.monotonic()

    def identity(self) -> dict[str, str]:
        """What must be equal for a training to be continued."""
        table = self.settings.model_dump(mode="json")
        return {
            **{f"training {key}": json.dumps(value) for key, value in table.items()},
            "training seed": str(self.seed),
            "training windows": self.windows.hash,
            "training dtype": str(self._precision).removeprefix("torch."),
            "training device": self.device.type,
            "training processes": str(self.group.size),
        }

    def evaluation_is_due(self) -> bool:
        done = self.result.steps
        if self.result.held_out and self.result.held_out[-1][0] == done:
            return False
        return done % self.settings.evaluation_interval == 0 or done == self.settings.steps

    def measure(self, evaluate: Callable[[], float]) -> None:
        """Look at the held-out text; keep what is best, stop where there is none for long."""
        found = self.group.agree(evaluate() if self.group.leads else 0.0)
        if not math.isfinite(found):
            raise NumericsError(
                f"training: the held-out text measures {found} after step {self.result.steps}",
                "try precision float32 or a lower learning rate",
            )
        patience = self.settings.patience
        held_out = [*self.result.held_out, (self.result.steps, found)]
        best = min(range(len(held_out)), key=lambda number: held_out[number][1])
        kept, stopped = self._best, None
        if patience is not None and best == len(held_out) - 1:
            kept = {name: value.detach().clone() for name, value in self.learned.items()}
        elif patience is not None and len(held_out) - 1 - best >= patience:
            stopped = f"no better since step {held_out[best][0]}"
        # At once, and last: a state that Ctrl-C makes holds the look and what came of it, or none.
        self._best, self.result.held_out, self.result.stopped = kept, held_out, stopped

    @torch.no_grad()
    def return_to_best(self) -> None:
        """Give the learner what was best on the held-out text, where that is kept."""
        for name, value in self._best.items():
            self.learned[name].copy_(value)

    def note(self) -> str:
        """The last loss, and the last measure."""
        words = []
        if self.result.losses:
            words.append(f"loss {self.result.losses[-1]['loss']:.4f}")
        if self.result.held_out:
            words.append(f"held out {self.result.held_out[-1][1]:.4f}")
        return ", ".join(words)

    def advance(self) -> None:
        """One update."""
        settings, result = self.settings, self.result
        row, tokens = self._gradients()
        self.group.add_up_gradients(self.learned.values())
        norm = torch.nn.utils.clip_grad_norm_(list(self.learned.values()), settings.clip)
        row["gradient"] = float(norm)
        for part, value in row.items():
            if not math.isfinite(value):
                raise NumericsError(
                    f"training: the {part} of step {result.steps + 1} is not finite",
                    "try precision float32 or a lower learning rate; if it is step 1, the model "
                    "itself computes values that are not finite",
                )
        warm_up = math.ceil(settings.warm_up * settings.steps)
        rate = settings.learning_rate * cosine_rate(result.steps, settings.steps, warm_up)
        for options in self._optimizer.param_groups:
            options["lr"] = rate
        self.whole = False
        self._optimizer.step()
        self.learner.after_step()
        result.losses.append(row)
        result.tokens += tokens
        result.steps += 1
        now = time.monotonic()
        result.seconds, self._since = result.seconds + now - self._since, now
        self.whole = True

    def state(self) -> TrainingState:
        """All that the next step depends on."""
        tensors = {f"{_BEST}.{name}": value for name, value in self._best.items()}
        for name, parameter in self.learned.items():
            tensors[f"{_VALUE}.{name}"] = parameter.detach()
            moments = self._optimizer.state[parameter]
            tensors.update({f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments})
        result = self.result
        details: dict[str, Any] = {
            "parts": result.losses,
            "held_out": result.held_out,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "stopped": result.stopped,
        }
        return TrainingState(result.steps, tensors, [row["loss"] for row in result.losses], details)

    @torch.no_grad()
    def restore(self, state: TrainingState) -> None:
        """Stand where `state` was taken."""
        for name, parameter in self.learned.items():
            parameter.copy_(state.tensors[f"{_VALUE}.{name}"])
            found = {key: state.tensors.get(f"{key}.{name}") for key in _MOMENTS}
            moments = {key: value for key, value in found.items() if value is not None}
            if moments:
                self._optimizer.state[parameter] = {
                    key: _placed(value, parameter) for key, value in moments.items()
                }
            if (best := state.tensors.get(f"{_BEST}.{name}")) is not None:
                self._best[name] = best.to(parameter.device)
        details = state.details
        self.result = TrainResult(
            losses=list(details["parts"]),
            held_out=[(int(step), float(value)) for step, value in details["held_out"]],
            steps=state.step,
            tokens=details["tokens"],
            seconds=details["seconds"],
            stopped=details["stopped"],
        )

    def _gradients(self) -> tuple[dict[str, float], int]:
        """The parts of the loss of the step's batch, and its tokens; the gradients of this
        process's share are in place."""
        settings, rows = self.settings, self.windows.train
        self._optimizer.zero_grad()
        if isinstance(self.learner, Stepping):
            self.learner.at_step(self.result.steps)
        length = rows.shape[1]
        count = min(max(1, settings.batch_tokens // length), len(rows))
        chosen = windows_of_step(self.result.steps, count, len(rows), self.seed)
        batch_tokens = max(1, _counted(rows[chosen]))
        sums: dict[str, float] = {}
        seen = 0
        own = rows[self.group.share(chosen)]
        for part in torch.split(own, max(1, settings.micro_tokens // length)):
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self._precision == torch.bfloat16
            ):
                parts = self.learner.loss(part.to(self.device))
            learner = self.learner
            count = learner.counted() if isinstance(learner, Counting) else _counted(part)
            seen, share = seen + count, count / batch_tokens
            (parts["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        counted, *values = self.group.add_up([float(seen), *sums.values()])
        if counted and counted != batch_tokens:
            # What counts was known only as it was computed: the mean is over that.
            values = [value * batch_tokens / counted for value in values]
            for parameter in self.learned.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(batch_tokens / counted)
        return dict(zip(sums, values, strict=True)), int(counted)


def _optimizer(learned: Mapping[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    matrices = [parameter for parameter in learned.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in learned.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=_BETAS,
        fused=True,
    )


def _placed(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment laid in memory as its parameter is: the fused update goes by the memory's order."""
    if moment.shape != parameter.shape:
        return moment.to(parameter.device)
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(moment)


def _counted(windows: Tensor) -> int:
    """The tokens that are predicted: all that are but the first of each window."""
    return int((windows[:, 1:] >= 0).sum())
