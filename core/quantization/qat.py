"""Quantization-aware training: the model learns from its unquantized self to live on its grids.

Rounding straight through (Bengio et al., 2013, arXiv 1308.3432), scales learned as in LSQ (Esser et
al., 2019, arXiv 1902.08153), the unquantized model as the teacher (LLM-QAT, Liu et al., 2023,
https://arxiv.org/abs/2305.17888).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import token_hash
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.models.hf import load_transformers
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.quantization.grid import Grid
from infopt.core.quantization.nearest import as_quantized, group_grids, held_zeros, quantize_nearest
from infopt.core.quantization.straight_through import from_steps, step_codes, storable_through
from infopt.core.training.distillation import distillation_loss
from infopt.core.training.schedule import cosine_rate, windows_of_step
from infopt.core.training.state import TrainingState, load_state, save_state

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
"""Gradients by steps of small scales are far below Adam's usual 1e-8."""
_CELL = 0.499
"""How far from its code a weight may start, in steps: half a step would round to its neighbour."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's, of each parameter: one that a step did not use, as an expert's, was not counted then."""


@dataclass(frozen=True, slots=True)
class QatSettings:
    """How long and how fast to train.

    learning_rate: what Adam moves a weight by at most, in steps of its grid, at its peak; scales
    and other parameters move by shares of their own size that `scale_rate` and `other_rate` give.
    batch_tokens: of one update; micro_tokens: of one pass, whose activations are in memory.
    hard: the share of cross-entropy in the loss; clip: the largest norm of the gradient.
    pull: how much of the way from the middle of its code towards the original weight it starts. At
    1 the many weights that GPTQ did not round to nearest lie at the edge of their code, and the
    first step turns them all at once, which undoes GPTQ; at 0 what nearest rounding knew is lost.
    """

    steps: int = 200
    learning_rate: float = 5e-3
    scale_rate: float = 5e-3
    other_rate: float = 5e-3
    batch_tokens: int = 2048
    micro_tokens: int = 2048
    warm_up: float = 0.05
    hard: float = 0.0
    clip: float = 2.0
    pull: float = 0.5
    seed: int = 0
    save_every: int = 50


@dataclass(frozen=True, slots=True)
class QatResult:
    """Codes by layer, the other trained parameters by their names, the loss of each step."""

    weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    losses: list[float]


@torch.enable_grad()
def train(
    artifact: Artifact,
    forms: Mapping[str, IntegerFormat],
    tokens: Tensor,
    settings: QatSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    initial: Mapping[str, QuantizedWeight] | None = None,
    folder: Path | None = None,
    progress: ProgressCallback = silent,
) -> QatResult:
    """Train the layers of `forms` on their grids, with tokens int64 [windows, length].

    Their weights and scales and all parameters of one dimension (norms, biases) learn to give the
    unquantized model's distribution of the next token; embeddings and zeros stay. Begins at exactly
    `initial`, else at the nearest codes of grids of the least squared error. What learns is kept in
    float32 and computed with in `dtype`. With a `folder` the state is made durable there every
    `save_every` steps, and taken up from there: on the same machine to the same bits.

    Raises NumericsError for a loss that is not finite, naming the step; ResumeError for a state of
    other work; UsageError where there is no text.
    """
    if not tokens.numel():
        raise UsageError("qat needs calibration text", "give at least one sample")
    model = load_transformers(artifact, dtype, device)
    student = _Student(model, forms, initial or {}, settings.pull)
    identity = _identity(artifact, forms, tokens, settings, initial or {}, dtype, device)
    trainer = _Trainer(model, student, tokens, settings)
    if folder is not None and (state := load_state(folder, identity)) is not None:
        trainer.restore(state)
    resumed = trainer.step
    while trainer.step < settings.steps:
        note = f"loss {trainer.losses[-1]:.4f}" if trainer.losses else ""
        progress(Progress("training", trainer.step, settings.steps, note, resumed))
        trainer.advance()
        due = trainer.step % settings.save_every == 0 and trainer.step < settings.steps
        if folder is not None and due:
            save_state(folder, identity, trainer.state())
    weights, others = student.result()
    return QatResult(weights, others, trainer.losses)


def qat_memory(
    parameters: int, *, dtype_bytes: int = 4, micro_tokens: int = 0, vocabulary: int = 0
) -> int:
    """Bytes that training all of `parameters` holds at once, activations of blocks not counted.

    The teacher, the rounded weight and its gradient in the compute dtype; the latent weight, its
    gradient and Adam's two moments in float32; and the logits of student and teacher, with the
    gradient and float32 working copies.
    """
    return parameters * (3 * dtype_bytes + 16) + 3 * micro_tokens * vocabulary * dtype_bytes


class _Layer:
    """A weight in training: steps [N, K] in units of scales that are `base` times e^growth."""

    def __init__(
        self, weight: Tensor, form: IntegerFormat, start: QuantizedWeight | None, pull: float
    ) -> None:
        original = weight.detach().to(torch.float32)
        self._held = held_zeros(original)
        if start is None:
            start = quantize_nearest(original, form, group_grids(original, form, mse=True))
        self.form = form
        self.base = start.scales.to(original.device, torch.float32)
        self.zero = start.zeros.to(original.device, torch.float32)
        middle = start.codes.to(original.device, torch.float32).reshape(*self.base.shape, -1)
        middle = middle - self.zero.unsqueeze(-1)
        steps = original.reshape(middle.shape) / self.base.unsqueeze(-1)
        # Within the cell of its code, where rounding finds that code again.
        within = steps.sub_(middle).clamp_(-_CELL, _CELL).mul_(pull)
        self.steps = (middle + within).reshape(original.shape).requires_grad_()
        self.growth = torch.zeros_like(self.base).requires_grad_()

    def weight(self) -> Tensor:
        """As it would be stored; gradients reach steps and growth."""
        return from_steps(self.steps, self._scale(), self.zero, self.form)

    @torch.no_grad()
    def hold(self) -> None:
        """Keep the steps in the cells of codes that exist, so that each can turn back at once, and
        the zeros of a pruned weight."""
        low = (-self.zero - 0.5).unsqueeze(-1)
        self.steps.view(*self.base.shape, -1).clamp_(low, low + self.form.max_code + 1)
        if self._held is not None:
            self.steps.masked_fill_(self._held, 0.0)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        codes = step_codes(self.steps, self.zero, self.form)
        return as_quantized(codes, Grid(self._scale(), self.zero), self.form)

    def _scale(self) -> Tensor:
        return storable_through(self.base * self.growth.exp(), self.form)


class _Student:
    """The model's stand-ins: its target layers on their grids, its norms and biases."""

    def __init__(
        self,
        model: PreTrainedModel,
        forms: Mapping[str, IntegerFormat],
        initial: Mapping[str, QuantizedWeight],
        pull: float,
    ) -> None:
        self.layers: dict[str, _Layer] = {}
        for name, form in forms.items():
            start = initial.get(name)
            _check_start(name, form, start)
            weight = model.get_parameter(f"{name}.weight")
            self.layers[name] = _Layer(weight, form, start, pull)
        self.others = {
            name: parameter.detach().to(torch.float32).clone().requires_grad_()
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.is_floating_point()
        }

    def learned(self) -> Iterator[tuple[str, Tensor]]:
        """All that learns, by names that are unique and lasting."""
        for name, layer in self.layers.items():
            yield f"steps.{name}", layer.steps
            yield f"growth.{name}", layer.growth
        for name, parameter in self.others.items():
            yield f"other.{name}", parameter

    def stand_ins(self) -> dict[str, Tensor]:
        """The parameters of the model that are replaced, in float32."""
        weights = {f"{name}.weight": layer.weight() for name, layer in self.layers.items()}
        return weights | self.others

    def result(self) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        weights = {name: layer.quantized() for name, layer in self.layers.items()}
        return weights, {name: value.detach() for name, value in self.others.items()}


class _Trainer:
    """The steps of a training."""

    def __init__(
        self, model: PreTrainedModel, student: _Student, tokens: Tensor, settings: QatSettings
    ) -> None:
        self.model, self.student, self.tokens, self.settings = model, student, tokens, settings
        self.step = 0
        self.losses: list[float] = []
        self._optimizer = torch.optim.Adam(
            [{"params": [p], "full": self._rate(name, p)} for name, p in student.learned()],
            betas=_BETAS,
            eps=_EPSILON,
            fused=True,
        )

    def advance(self) -> None:
        """One update."""
        settings = self.settings
        loss = self._gradients()
        parameters = [parameter for _, parameter in self.student.learned()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"qat: the {'gradient' if math.isfinite(loss) else 'loss'} of step {self.step + 1} "
                "is not finite",
                "try --dtype float32 or a lower learning rate; if it is step 1, the model itself "
                "computes values that are not finite",
            )
        warm_up = math.ceil(settings.warm_up * settings.steps)
        share = cosine_rate(self.step, settings.steps, warm_up)
        for group in self._optimizer.param_groups:
            group["lr"] = share * group["full"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        for layer in self.student.layers.values():
            layer.hold()
        self.losses.append(loss)
        self.step += 1

    def state(self) -> TrainingState:
        """All that the next step depends on."""
        tensors = {}
        for name, parameter in self.student.learned():
            tensors[name] = parameter.detach()
            moments = self._optimizer.state[parameter]
            tensors.update({f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments})
        return TrainingState(self.step, tensors, list(self.losses))

    def restore(self, state: TrainingState) -> None:
        """Stand where `state` was taken."""
        for name, parameter in self.student.learned():
            with torch.no_grad():
                parameter.copy_(state.tensors[name])
            moments = {
                key: state.tensors[f"{key}.{name}"].to(parameter.device)
                for key in _MOMENTS
                if f"{key}.{name}" in state.tensors
            }
            if moments:
                self._optimizer.state[parameter] = moments
        self.step, self.losses = state.step, list(state.losses)

    def _gradients(self) -> float:
        """The loss of the step's batch; its gradients are added to what learns."""
        weights = self.student.stand_ins()
        # Leaves between rounding and model: each weight is rounded once, however many passes.
        leaves = {
            name: weight.detach().to(self.model.dtype).requires_grad_()
            for name, weight in weights.items()
        }
        settings, length, total = self.settings, self.tokens.shape[1], 0.0
        count = min(max(1, settings.batch_tokens // length), len(self.tokens))
        chosen = windows_of_step(self.step, count, len(self.tokens), settings.seed)
        for part in torch.split(self.tokens[chosen], max(1, settings.micro_tokens // length)):
            loss = self._loss(part.to(self.model.device), leaves) * (len(part) / count)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        for name, weight in weights.items():
            gradient, leaves[name].grad = leaves[name].grad, None
            if gradient is not None:
                weight.backward(gradient.to(weight.dtype))  # type: ignore[no-untyped-call]
        return total

    def _loss(self, part: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = self.model(input_ids=part, use_cache=False).logits
        call = {"input_ids": part, "use_cache": False}
        found = functional_call(self.model, dict(leaves), (), call).logits
        follow: Tensor | None = None
        if self.settings.hard:
            # The last token of a window has no follower in it.
            follow = torch.nn.functional.pad(part[:, 1:], (0, 1), value=-1).flatten()
        return distillation_loss(
            found.flatten(0, 1), wanted.flatten(0, 1), follow, self.settings.hard
        )

    def _rate(self, name: str, parameter: Tensor) -> float:
        """Steps and growth are relative already; what else learns is of any size."""
        match name.partition(".")[0]:
            case "steps":
                return self.settings.learning_rate
            case "growth":
                return self.settings.scale_rate
        return self.settings.other_rate * max(float(parameter.detach().abs().mean()), 1e-3)


def _check_start(name: str, form: IntegerFormat, start: QuantizedWeight | None) -> None:
    if start is None:
        return
    columns, groups = start.codes.shape[1], start.scales.shape[1]
    order = torch.arange(columns, device=start.group_index.device) * groups // columns
    if start.format != form or not torch.equal(start.group_index.long(), order):
        raise UnsupportedError(
            f"qat cannot begin at the codes of {name}: "
            + ("they are of another format" if start.format != form else "its groups are scattered")
        )


def _identity(
    artifact: Artifact,
    forms: Mapping[str, IntegerFormat],
    tokens: Tensor,
    settings: QatSettings,
    initial: Mapping[str, QuantizedWeight],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, str]:
    """What must be equal for a training to be continued."""
    table: dict[str, Any] = {name: asdict(form) for name, form in forms.items()}
    begun: Sequence[Tensor] = [
        part for name in sorted(initial) for part in (initial[name].codes, initial[name].scales)
    ]
    digest = hashlib.sha256()
    for part in begun:
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return {
        "model": artifact.fingerprint(),
        "tokens": token_hash(tokens),
        "layers": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
        "start": digest.hexdigest(),
        "compute dtype": str(dtype),
        "device": device.type,
        "torch version": torch.__version__,
        **{
            f"setting {key}": json.dumps(value)
            for key, value in asdict(settings).items()
            if key != "save_every"
        },
    }
