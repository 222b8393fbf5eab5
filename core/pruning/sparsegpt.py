"""SparseGPT: remove weights column by column, and let those to come make up for each error.

Frantar and Alistarh, 2023, https://arxiv.org/abs/2301.00774. Pure: no module, hook or device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.compression.factor import inverse_factor
from infopt.core.pruning.mask import drop_lowest, group_mask, removed_count
from infopt.core.pruning.wanda import wanda_mask
from infopt.core.recipe.prune import Pattern

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class SparseGptResult:
    """The weight float32 [N, K] with zeros where `mask` is false, and what it took to get it.

    damp: the share of the mean diagonal that was added; fallback: None, or in words how far the
    ladder was climbed.
    """

    weight: Tensor
    mask: Tensor
    damp: float
    fallback: str | None


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern, *, damp: float = 0.01, block: int = _BLOCK
) -> SparseGptResult:
    """Prune a weight [N, K] under a Hessian float32 [K, K] of its inputs.

    A share is chosen within each block of columns by w^2 / U_ii^2, as corrected by then; N:M within
    each group when its turn comes, so that M divides K. Inputs that are always 0 lose their weights
    first. Without a Cholesky factor the layer is pruned as Wanda does it.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        return _by_wanda(weight, hessian, pattern, 0.0, "no input but zeros reached this layer")
    prepared = hessian.clone()
    prepared.diagonal()[dead] = diagonal[~dead].mean()
    factor, used, climbed = inverse_factor(prepared, damp)
    if factor is None:
        return _by_wanda(weight, hessian, pattern, used, "the Hessian has no Cholesky factor")
    columns = weight.float().T.contiguous()
    mask = _sweep(columns, factor, dead, pattern, block)
    return SparseGptResult(columns.mul_(mask).T, mask.T, used, climbed)


def _by_wanda(
    weight: Tensor, hessian: Tensor, pattern: Pattern, damp: float, why: str
) -> SparseGptResult:
    mask = wanda_mask(weight.float(), hessian, pattern)
    return SparseGptResult(weight.float() * mask, mask, damp, f"wanda: {why}")


def _sweep(columns: Tensor, factor: Tensor, dead: Tensor, pattern: Pattern, block: int) -> Tensor:
    """Correct the columns [K, N] in place, one after the other; returns their mask [K, N]."""
    total, rows = columns.shape
    if pattern.of is not None:
        block = max(pattern.of, block // pattern.of * pattern.of)
    mask = torch.ones_like(columns, dtype=torch.bool)
    # A weight on a dead input costs nothing.
    worth = torch.where(dead, 0.0, 1 / factor.diagonal().square()).unsqueeze(1)
    for start in range(0, total, block):
        stop = min(start + block, total)
        part = slice(start, stop)
        current, kept = columns[part], mask[part]
        if pattern.of is None:
            # As many in all as the share is of the layer, whatever the blocks are.
            before, after = (removed_count(rows * end, pattern.share) for end in (start, stop))
            scores = (current.square() * worth[part]).reshape(-1)
            kept.copy_(drop_lowest(scores, after - before).view_as(kept))
        errors = _block(current, factor[part, part], worth[part], kept, pattern)
        columns[stop:].addmm_(factor[part, stop:].T, errors, alpha=-1)
    return mask


def _block(
    current: Tensor, factor: Tensor, worth: Tensor, kept: Tensor, pattern: Pattern
) -> Tensor:
    """The columns [B, N] of a block and, for N:M, their mask, in place; returns errors [B, N]."""
    errors = torch.zeros_like(current)
    for index, pivot in enumerate(factor.diagonal().tolist()):
        if pattern.of is not None and index % pattern.of == 0:
            group = slice(index, index + pattern.of)
            scores = (current[group].square() * worth[group]).T
            kept[group] = group_mask(scores, pattern).T
        error = errors[index]
        # What the column loses; a weight that stays loses nothing.
        torch.mul(current[index], ~kept[index], out=error).div_(pivot)
        current[index + 1 :].addr_(factor[index, index + 1 :], error, alpha=-1)
    return errors
