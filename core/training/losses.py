"""Losses of distillation, as functions of logits and states.

Every loss is the mean over what it is given; who masks rows selects them before. Divergences are
times T^2, so that the gradient's size does not depend on the temperature (Hinton et al., 2015,
https://arxiv.org/abs/1503.02531). float64 is computed in float64, all else in float32.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["forward-kl", "reverse-kl", "jsd"]

_CHUNK_BYTES = 64 << 20
_NO_POWER = 1e-12
"""Added to a state's mean square, so that one of zeros has a direction."""


@dataclass(frozen=True, slots=True)
class TopK:
    """What a teacher holds likeliest: `indices` int64 [rows, k], `log_p` float32 [rows, k].

    The log-probabilities are those of the whole distribution at the temperature they were taken at.
    """

    indices: Tensor
    log_p: Tensor


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: Kind,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """The divergence of the student's distribution from the teacher's in nats, times T^2.

    Logits [rows, vocabulary]; the mean over rows. With p the teacher's and q the student's at the
    temperature: forward KL(p||q), reverse KL(q||p), or the generalized Jensen-Shannon
    beta KL(p||M) + (1 - beta) KL(q||M) with M = beta p + (1 - beta) q (GKD, Agarwal et al., 2023,
    https://arxiv.org/abs/2306.13649). Computed by chunks of rows, gradient included; the teacher
    gets none. Raises ValueError for vocabularies that differ or a beta that is not within 0 and 1.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"logits {list(student.shape)} and {list(teacher.shape)} do not compare")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature} is not above 0")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta {beta} is not within 0 and 1: use forward-kl or reverse-kl there")
    loss: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student, teacher.detach(), kind, temperature, beta
    )
    return loss


def cross_entropy(student: Tensor, tokens: Tensor) -> Tensor:
    """The mean over rows of -log q(token) in nats: logits [rows, vocabulary], int64 [rows].

    A row with a negative token does not count; 0 where none does.
    """
    counted = tokens >= 0
    total = F.cross_entropy(
        _wide(student), tokens.where(counted, -1), ignore_index=-1, reduction="sum"
    )
    return total / counted.sum().clamp(min=1)


def top_k(teacher: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens of each row of logits [rows, vocabulary], and their log-probabilities.

    Raises ValueError where the vocabulary is smaller than k.
    """
    if not 1 <= k <= teacher.shape[1]:
        raise ValueError(f"k {k} is not within 1 and the vocabulary's {teacher.shape[1]}")
    scaled = _wide(teacher) / temperature
    values, indices = scaled.topk(k, dim=-1)
    log_p = values - scaled.logsumexp(dim=-1, keepdim=True)
    return TopK(indices, log_p.to(torch.float32))


def top_k_divergence(student: Tensor, top: TopK, *, temperature: float = 1.0) -> Tensor:
    """Forward KL times T^2 to a teacher of whom the k likeliest tokens are known.

    All other tokens are one outcome: of the mass that the teacher has left, and of all that the
    student gives them. So it is never more than the whole KL, equals it where k is the whole
    vocabulary, and no mass is lost or made up; how the rest is divided is not taught. `temperature`
    is the one that `top` was taken at. Student [rows, vocabulary]; the mean over rows.
    """
    scaled = _wide(student) / temperature
    log_p = top.log_p.to(scaled)
    log_all = scaled.logsumexp(dim=-1, keepdim=True)
    log_q = scaled.gather(-1, top.indices) - log_all
    each = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if top.indices.shape[1] < student.shape[1]:
        others = scaled.scatter(-1, top.indices, -torch.inf)
        log_q_rest = others.logsumexp(dim=-1) - log_all[:, 0]
        rest = -torch.expm1(log_p.logsumexp(dim=-1).clamp(max=0))
        each = each + torch.xlogy(rest, rest) - rest * log_q_rest
    return each.mean() * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, projection: Tensor | None = None) -> Tensor:
    """The mean squared error of states of root mean square 1: student [rows, h], teacher [rows, H].

    `projection` [H, h] takes the student's states to the teacher's width; none where h = H. As each
    state has unit power it is 2 (1 - cos), whatever the models' scales.
    """
    wide = _wide(student)
    if projection is not None:
        wide = wide @ projection.to(wide.dtype).T
    if wide.shape != teacher.shape:
        raise ValueError(f"states {list(wide.shape)} and {list(teacher.shape)} do not compare")
    return F.mse_loss(_unit(wide), _unit(_wide(teacher)))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of attention rows in nats: student [..., h, q, k], teacher [..., H, q,
    k], both probabilities; the mean over all rows.

    Where h and H differ, heads that lie together are averaged on both sides, down to the greatest
    common divisor of h and H; a mean of distributions is one.
    """
    groups = math.gcd(student.shape[-3], teacher.shape[-3])
    q, p = _grouped(_wide(student), groups), _grouped(_wide(teacher), groups)
    # What a student rounds to no attention at all costs much, but not everything.
    log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1).mean()


class _Divergence(torch.autograd.Function):
    """One pass over chunks of rows gives both: with s = z / T, g_i = d loss / d s_i is
    q - p (forward), q (log q/p - KL(q||p)) (reverse), (1 - beta) q (log q/M - KL(q||M)) (jsd)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kind: Kind, temperature: float, beta: float
    ) -> Tensor:
        rows = max(1, len(student))
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK_BYTES // (4 * student.shape[1]))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            log_q = (_wide(student[part]) / temperature).log_softmax(-1)
            log_p = (_wide(teacher[part]) / temperature).log_softmax(-1)
            each, slope = _rows(log_p, log_q, kind, beta)
            total += each.sum()
            if gradient is not None:
                gradient[part] = slope.mul_(temperature / rows)
        ctx.gradient = gradient
        wide = torch.promote_types(student.dtype, torch.float32)
        return (total * (temperature**2 / rows)).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None, None, None


def _rows(log_p: Tensor, log_q: Tensor, kind: Kind, beta: float) -> tuple[Tensor, Tensor]:
    """Each row's divergence [rows], and its gradient by the student's scaled logits."""
    p, q = log_p.exp(), log_q.exp()
    match kind:
        case "forward-kl":
            return _kl(p, log_p, log_q), q - p
        case "reverse-kl":
            each = _kl(q, log_q, log_p)
            return each, q * (log_q - log_p - each[:, None])
        case "jsd":
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            of_student = _kl(q, log_q, log_m)
            slope = (1 - beta) * q * (log_q - log_m - of_student[:, None])
            return beta * _kl(p, log_p, log_m) + (1 - beta) * of_student, slope


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; what has no mass costs nothing."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _unit(states: Tensor) -> Tensor:
    return states * (states.square().mean(dim=-1, keepdim=True) + _NO_POWER).rsqrt()


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[..., heads, q, k] to [..., groups, q, k], the mean of neighbours."""
    heads, queries, keys = rows.shape[-3:]
    return rows.reshape(*rows.shape[:-3], groups, heads // groups, queries, keys).mean(dim=-3)
