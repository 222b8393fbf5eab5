"""What training against a teacher needs: the loss, the schedule, the data's order, a safe state."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.core.errors import ResumeError
from infopt.core.files import disk_faults, fsync, sha256, write_atomically

_CHUNK_BYTES = 64 << 20
_CURRENT = "CURRENT"


def distillation_loss(
    student: Tensor, teacher: Tensor, tokens: Tensor | None = None, hard: float = 0.0
) -> Tensor:
    """KL(teacher || student) in nats, the mean over the rows of logits [rows, vocabulary].

    With `hard` > 0 that share of the loss is the cross-entropy with `tokens` int64 [rows]; a row of
    which the token is negative has no share of it. Everything is computed in float32 by chunks.
    The teacher's logits are overwritten: no third tensor of that size is ever made.
    """
    if hard and tokens is None:
        raise ValueError("the cross-entropy needs tokens")
    loss: Tensor = _Distillation.apply(  # type: ignore[no-untyped-call]
        student, teacher, tokens, hard
    )
    return loss


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, tokens: Tensor | None, hard: float
    ) -> Tensor:
        rows = len(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        counted = max(1, int((tokens >= 0).sum())) if tokens is not None else 1
        step = max(1, _CHUNK_BYTES // (4 * student.shape[1]))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            log_q = student[part].float().log_softmax(-1)
            log_p = teacher[part].float().log_softmax(-1)
            p = log_p.exp()
            total += (1 - hard) / rows * torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
            weight = torch.full((len(p), 1), (1 - hard) / rows, device=p.device)
            wanted = p.mul_(weight)
            if hard and tokens is not None:
                chosen = tokens[part, None]
                each = (chosen >= 0) * (hard / counted)
                total -= (log_q.gather(-1, chosen.clamp(min=0)) * each).sum()
                wanted.scatter_add_(-1, chosen.clamp(min=0), each.to(wanted.dtype))
                weight = weight + each
            teacher[part] = log_q.exp_().mul_(weight).sub_(wanted).to(teacher.dtype)
        ctx.gradient = teacher
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient.mul_(grads[0].to(ctx.gradient.dtype)), None, None, None


def cosine_rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the full learning rate at a step from 0: a rise over `warm_up`, then a cosine
    down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def windows_of_step(step: int, count: int, windows: int, seed: int) -> list[int]:
    """Which `count` of `windows` a step sees: a new order each round, and nothing to remember."""
    first = step * count
    found = []
    for position in range(first, first + count):
        generator = torch.Generator().manual_seed(seed + position // windows)
        order = torch.randperm(windows, generator=generator)
        found.append(int(order[position % windows]))
    return found


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a training stands after `step` steps: all tensors that it goes on from, its losses."""

    step: int
    tensors: dict[str, Tensor]
    losses: list[float]


def save_state(folder: Path, identity: Mapping[str, str], state: TrainingState) -> None:
    """Make a state durable in `folder`, in place of the one before; a kill leaves one of the two.

    safetensors and JSON; CURRENT is replaced last and holds the SHA-256 of what it names.
    """
    name = f"state-{state.step:06d}.safetensors"
    file, temporary = folder / name, folder / f".{name}.tmp"
    with disk_faults(file):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.tensors.items()}, temporary)
        fsync(temporary)
        temporary.replace(file)
        fsync(folder)
    table = {
        "identity": dict(identity),
        "step": state.step,
        "losses": state.losses,
        "file": name,
        "sha256": sha256(file),
    }
    write_atomically(folder / _CURRENT, json.dumps(table))
    for old in folder.glob("*state-*.safetensors*"):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_state(folder: Path, identity: Mapping[str, str]) -> TrainingState | None:
    """The state that was made durable in `folder`, on the CPU; None where there is none.

    Raises ResumeError where it is damaged or was begun with another identity.
    """
    if not (folder / _CURRENT).exists():
        return None
    try:
        table = json.loads((folder / _CURRENT).read_text())
        begun, file = table["identity"], folder / table["file"]
        for key in [*identity, *begun]:
            if identity.get(key) != begun.get(key):
                raise ResumeError(
                    f"the training in {folder} was begun with another {key}: "
                    f"{begun.get(key)}, now {identity.get(key)}",
                    "repeat the request as it was, or discard the work",
                )
        if sha256(file) != table["sha256"]:
            raise _damaged(file)
        return TrainingState(table["step"], load_file(file), table["losses"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder) from error


def _damaged(path: Path) -> ResumeError:
    return ResumeError(
        f"the training cannot be continued: {path} is missing or damaged",
        "discard the work and begin anew",
    )
