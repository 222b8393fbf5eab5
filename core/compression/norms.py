"""How a norm applies its gain: times the weight, or times one plus the weight."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

_ROWS = 4
_TOLERANCE = 1e-4


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float | None:
    """The c of a module that computes normalized(x) * (c + weight) + bias: 0.0, 1.0, or None.

    Gemma's norms have 1, most others 0. The module is run with weights of its own making, so it
    tells by numbers, not by names; its parameters are left alone and may be on the meta device.
    None for a module without a 1-D `weight`, or that computes anything else.
    """
    weight = norm._parameters.get("weight")
    if weight is None or weight.ndim != 1:
        return None
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)
    # Not centred, so that a norm that takes the mean away differs from one that does not.
    x = torch.randn(1, _ROWS, len(weight), generator=generator).add_(0.5).to(device)
    gain, bias = (torch.randn(len(weight), generator=generator).to(device) for _ in range(2))
    try:
        plain, one, shaped, moved = (
            _run(norm, x, *parts)
            for parts in (
                (gain * 0, bias * 0),
                (torch.ones_like(gain), bias * 0),
                (gain, bias * 0),
                (gain, bias),
            )
        )
    except (TypeError, ValueError, RuntimeError):
        return None  # it takes other inputs than the hidden states: no norm that we know
    if plain.shape != x.shape:
        return None
    unit = one - plain
    has_bias = norm._parameters.get("bias") is not None
    affine = _close(shaped, plain + gain * unit) and _close(moved, shaped + bias * has_bias)
    for offset in (0.0, 1.0):
        if affine and _close(plain, offset * unit):
            return offset
    return None


def _run(norm: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    given = {"weight": weight}
    if norm._parameters.get("bias") is not None:
        given["bias"] = bias
    output = functional_call(norm, given, (x,))
    if not isinstance(output, Tensor):
        raise TypeError("a norm returns one tensor")
    return output


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _TOLERANCE)
