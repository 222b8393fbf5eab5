"""Rounding that gradients pass through: weights as they will be stored, and yet trainable.

Rounding has a gradient of 0 almost everywhere; straight through, it is taken for the identity
(Bengio et al., 2013, https://arxiv.org/abs/1308.3432). Pure functions: no module, hook or device.
"""

from typing import Any

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat, round_inputs
from infopt.core.formats.number import IntegerFormat
from infopt.core.quantization.grid import storable


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, form: IntegerFormat, offset: Tensor | None = None
) -> Tensor:
    """A weight [N, K] rounded on grids [N, G] and dequantized; `offset` [N, K] shifts, in steps.

    Gradients: to the weight and the offset where the code is not clipped; to the zero where it is;
    to the scale as in LSQ (Esser et al., 2019, https://arxiv.org/abs/1902.08153): code less weight
    in steps, or the clipped code. LSQ's constant on that gradient is left out, as sign descent and
    Adam do not feel one.
    """
    found: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        weight, scale, zero, offset, form.max_code
    )
    return found


def rounded_codes(
    weight: Tensor, scale: Tensor, zero: Tensor, form: IntegerFormat, offset: Tensor | None = None
) -> Tensor:
    """The codes [N, K], float32, that `fake_quantize` rounds to."""
    _, raw = _codes(weight, scale, zero, offset)
    return raw.clamp_(0.0, float(form.max_code)).reshape(weight.shape)


def step_codes(steps: Tensor, zero: Tensor, form: IntegerFormat) -> Tensor:
    """The codes [N, K], float32, that `from_steps` rounds to."""
    levels = _levels(steps, zero, form.max_code)
    return levels.add_(zero.unsqueeze(-1)).reshape(steps.shape)


def from_steps(steps: Tensor, scale: Tensor, zero: Tensor, form: IntegerFormat) -> Tensor:
    """The weight [N, K] that `steps`, a weight in units of its scale [N, G], is rounded to.

    A change of the scale moves no code here, so its gradient is exact; that of the steps goes
    straight through, clipped or not: keep them on the grid and none is ever lost.
    """
    found: Tensor = _FromSteps.apply(  # type: ignore[no-untyped-call]
        steps, scale, zero, form.max_code
    )
    return found


def storable_through(scale: Tensor, form: IntegerFormat) -> Tensor:
    """The scale as it will be stored, in float32; the gradient is the scale's own."""
    return through(scale, storable(scale.detach(), form))


def round_inputs_through(
    x: Tensor, form: ActivationFormat, input_scale: Tensor | None = None
) -> Tensor:
    """`round_inputs` with the gradient of the inputs as they were."""
    return through(x, round_inputs(x.detach(), form, input_scale))


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` exactly, with the gradient of `value`."""
    found: Tensor = _Through.apply(value, rounded)  # type: ignore[no-untyped-call]
    return found


class _Through(torch.autograd.Function):
    """value + (rounded - value), as it is often written, would not be `rounded` exactly."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _FakeQuantize(torch.autograd.Function):
    """Only what it was given is kept for the way back, and the codes are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor,
        offset: Tensor | None,
        max_code: int,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, zero, offset)
        ctx.max_code = max_code
        _, raw = _codes(weight, scale, zero, offset)
        codes = raw.clamp_(0.0, float(max_code))
        return codes.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero, offset = ctx.saved_tensors
        steps, raw = _codes(weight, scale, zero, offset)
        codes = raw.clamp(0.0, float(ctx.max_code))
        inside = (codes == raw).to(steps.dtype)
        grad = grads[0].reshape(steps.shape)
        passed = grad * inside
        to_scale = (grad * (codes - zero.unsqueeze(-1)) - passed * steps).sum(-1)
        to_zero = (passed - grad).sum(-1) * scale if ctx.needs_input_grad[2] else None
        to_offset = (
            (passed * scale.unsqueeze(-1)).reshape(weight.shape) if offset is not None else None
        )
        return passed.reshape(weight.shape), to_scale, to_zero, to_offset, None


class _FromSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
        ctx.save_for_backward(steps, scale, zero)
        ctx.max_code = max_code
        return (_levels(steps, zero, max_code) * scale.unsqueeze(-1)).reshape(steps.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, scale, zero = ctx.saved_tensors
        levels = _levels(steps, zero, ctx.max_code)
        grad = grads[0].reshape(levels.shape)
        to_scale = levels.mul_(grad).sum(-1)
        return (grad * scale.unsqueeze(-1)).reshape(steps.shape), to_scale, None, None


def _codes(
    weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Steps [N, G, columns] without the offset, and the codes with it, before they are clipped."""
    steps = weight.reshape(*scale.shape, -1) / scale.unsqueeze(-1)
    shifted = steps if offset is None else steps + offset.reshape(steps.shape)
    return steps, torch.round(shifted) + zero.unsqueeze(-1)


def _levels(steps: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """Codes less their zeros [N, G, columns]."""
    grouped = torch.round(steps.reshape(*zero.shape, -1))
    return grouped.clamp_(-zero.unsqueeze(-1), max_code - zero.unsqueeze(-1))
