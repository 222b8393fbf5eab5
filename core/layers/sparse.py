"""2:4 weights in the layout that NVIDIA's sparse tensor cores multiply."""

import torch
from torch import Tensor, nn

from infopt.core.errors import UnsupportedError

_DTYPES = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
_ROWS, _COLUMNS = 32, 64
"""What the outputs and the inputs of a layer are multiples of, for 16-bit weights."""


def is_two_of_four(weight: Tensor) -> bool:
    """Whether no four neighbours of a row of a weight [N, K] have more than two that are not 0."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) != 0).sum(dim=-1) <= 2).all())


def to_semi_structured(model: nn.Module) -> int:
    """Store every 2:4 weight of a linear layer in torch's semi-structured layout; how many it were.

    In place, for inference. Layers whose sides the kernels cannot take (outputs by 32, inputs by
    64) stay dense, and so do tied weights. Raises UnsupportedError for a 2:4 layer that is not on
    an NVIDIA GPU from Ampere on, or not in float16 or bfloat16: nothing else has such kernels.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and owners[id(module.weight)] == 1
        and _fits(module.weight)
        and is_two_of_four(module.weight)
    ]
    for name, module in found:
        _check_device(name, module.weight)
    for _, module in found:
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return len(found)


def _fits(weight: Tensor) -> bool:
    return weight.shape[0] % _ROWS == 0 and weight.shape[1] % _COLUMNS == 0


def _check_device(name: str, weight: Tensor) -> None:
    if weight.device.type != "cuda" or torch.version.cuda is None:
        raise UnsupportedError(
            f"{name} is on {weight.device.type}, and only NVIDIA GPUs have 2:4 kernels",
            "on other devices a 2:4 model runs dense",
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _AMPERE:
        raise UnsupportedError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}, and 2:4 kernels "
            "begin with 8.0 (Ampere)"
        )
    if weight.dtype not in _DTYPES:
        raise UnsupportedError(
            f"{name} is {str(weight.dtype).removeprefix('torch.')}, and 2:4 kernels take float16 "
            "and bfloat16",
            "load the model in one of them",
        )
