"""Gather the statistics of layers' inputs on a walk through a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infopt.core.compression.finite import all_finite
from infopt.core.compression.statistics import (
    InputStatistics,
    accumulate_hessian,
    complete_hessian,
)
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError

Group = tuple[str, ...]
"""Layers that share an input."""
_SAMPLE_ROWS = 1024


@dataclass(slots=True)
class _Running:
    hessian: Tensor
    rows: int = 0
    abs_sum: Tensor | None = None
    abs_max: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)
    drift: Tensor | None = None


def gather(
    walk: Walk, groups: Sequence[Group], *, ranges: bool = False, reference: Walk | None = None
) -> dict[Group, InputStatistics]:
    """Statistics of each group's shared input in the loaded block, over all calibration batches.

    `ranges` asks for magnitudes and a sample as well; `reference` is a walk through the original
    model that stands at the same block, for the drift. Raises NumericsError naming the layer whose
    inputs are not finite.
    """
    leaders = {group[0]: group for group in groups}
    running = {
        name: _Running(torch.zeros(2 * (walk.layer(name).in_features,), device=walk.device))
        for name in leaders
    }
    quota = max(1, _SAMPLE_ROWS // max(1, len(walk.tokens) - 1)) if ranges else 0
    others = reference.inputs(list(leaders)) if reference is not None else None
    for seen in walk.inputs(list(leaders)):
        originals = next(others) if others is not None else {}
        for name, inputs in seen.items():
            _fold(running[name], inputs, quota, originals.get(name))
    return {leaders[name]: _finished(name, part) for name, part in running.items()}


def _fold(part: _Running, inputs: Tensor, quota: int, original: Tensor | None) -> None:
    if not inputs.numel():
        return  # an expert that no token of this batch was routed to
    before = part.rows
    part.rows = accumulate_hessian(part.hessian, inputs, before)
    if original is None and not quota:
        return
    rows = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    if original is not None:
        if part.drift is None:
            part.drift = torch.zeros_like(part.hessian)
        gap = original.reshape(rows.shape).to(torch.float32) - rows
        part.drift.addmm_(gap.T, rows, beta=before / part.rows, alpha=2 / part.rows)
    if quota:
        sizes = rows.abs()
        total, most = sizes.sum(dim=0), sizes.amax(dim=0)
        part.abs_sum = total if part.abs_sum is None else part.abs_sum + total
        part.abs_max = most if part.abs_max is None else torch.maximum(part.abs_max, most)
        # Evenly over the batch: the first tokens of a window are not like the others.
        chosen = torch.linspace(0, len(rows) - 1, min(quota, len(rows))).long()
        part.sample.append(rows[chosen.to(rows.device)])


def _finished(name: str, part: _Running) -> InputStatistics:
    if not all_finite(part.hessian):
        raise NumericsError(
            f"the activations that reach {name} are not finite or overflow",
            "try --dtype float32; if it is so already, the weights are broken",
        )
    return InputStatistics(
        hessian=complete_hessian(part.hessian),
        rows=part.rows,
        abs_mean=None if part.abs_sum is None else part.abs_sum / part.rows,
        abs_max=part.abs_max,
        sample=torch.cat(part.sample) if part.sample else None,
        drift=part.drift,
    )
