"""GPT-2's Conv1D as the linear layer that it is."""

from typing import cast

import torch
from torch import Tensor, nn


class TransposedLinear(nn.Linear):
    """A linear layer whose weight a dense checkpoint holds as [inputs, outputs].

    Codes of a quantized checkpoint are [outputs, inputs], as of any linear layer.
    """


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the dense weight of the layer `name` is stored transposed."""
    return isinstance(model.get_submodule(name), TransposedLinear)


def linearize(model: nn.Module) -> None:
    """Replace every Conv1D of a model on the meta device by a TransposedLinear."""
    for name, module in list(model.named_modules()):
        if _is_conv1d(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _linear(module))


def transposed_layout(weight: Tensor) -> Tensor:
    """The same [outputs, inputs] as a view of [inputs, outputs]: as Conv1D lays it in memory.

    So a product is the same call on the same memory, and its result the same to the last bit.
    """
    return weight.T.contiguous().T


def _is_conv1d(module: nn.Module) -> bool:
    """y = x W + b with a weight [nx, nf], whatever the class is called."""
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
    return (
        weight is not None
        and tuple(weight.shape) == sizes
        and (bias is None or tuple(bias.shape) == sizes[1:])
        and set(module._parameters) <= {"weight", "bias"}
        and not module._modules
    )


def _linear(module: nn.Module) -> TransposedLinear:
    weight = cast(Tensor, module._parameters["weight"])
    inputs, outputs = weight.shape
    bias = module._parameters.get("bias") is not None
    linear = TransposedLinear(
        inputs, outputs, bias, device=torch.device("meta"), dtype=weight.dtype
    )
    return linear.train(module.training).requires_grad_(weight.requires_grad)
