"""Weights that pruning removed, held at zero while the rest learns."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PRUNED_SHARE = 0.05
"""Of a matrix: dense models have hardly a zero among their weights."""


def pruned_masks(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Of each matrix within the blocks that was pruned, by its zeros: true where a weight stays."""
    from infopt.core.models.hf import blocks

    inside = tuple(f"{name}." for name, _ in blocks(model))
    found: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        if name.startswith(inside) and value.ndim >= 2:
            kept = value.detach() != 0
            if int(kept.sum()) <= (1 - _PRUNED_SHARE) * kept.numel():
                found[name] = kept
    return found


def hold(
    model: nn.Module, masks: Mapping[str, Tensor], learned: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """True where a mask cuts, for the masks of what learns; gradients are cut as they arrive.

    Raises ValueError for a mask of no parameter, or of another shape than its parameter's.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in learned.items()}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        parameter = known.get(name)
        if parameter is None or mask.shape != parameter.shape:
            raise ValueError(f"the mask of {name} is of no parameter, or of another shape")
        if id(parameter) in names:
            hole = ~mask.to(parameter.device, torch.bool)
            found[names[id(parameter)]] = hole
            cut = partial(_cut_gradient, hole)
            parameter.register_post_accumulate_grad_hook(cut)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def empty(holes: Mapping[str, Tensor], learned: Mapping[str, nn.Parameter]) -> None:
    """Set to zero what is cut."""
    for name, hole in holes.items():
        learned[name].masked_fill_(hole, 0.0)


def _cut_gradient(hole: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.masked_fill_(hole, 0.0)
