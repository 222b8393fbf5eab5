"""The distillation loss at full precision in little memory: forward KL with a share of CE."""

from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


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
