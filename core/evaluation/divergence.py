"""How far a model's predictions are from its baseline's, position by position."""

import torch
from torch import Tensor

from infopt.core.evaluation.perplexity import row_chunks


def divergence(baseline: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p_baseline || p_model), float64 [T] in nats, and whether the top tokens agree, bool [T].

    Both logits are [T, V], of any dtype; softmax in float32, sums in float64, a chunk of rows at a
    time. Nothing is clamped: rounding may leave a KL near zero slightly negative.
    """
    kl = torch.empty(len(baseline), dtype=torch.float64)
    agree = torch.empty(len(baseline), dtype=torch.bool)
    for rows in row_chunks(*baseline.shape):
        log_p = baseline[rows].float().log_softmax(1)
        log_q = model[rows].float().log_softmax(1)
        p = log_p.exp()
        # A token of probability 0 adds nothing; without the mask it would add 0 * (-inf + inf).
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        kl[rows] = terms.sum(1, dtype=torch.float64).cpu()
        agree[rows] = (log_p.argmax(1) == log_q.argmax(1)).cpu()
    return kl, agree
