"""Static scales of an 8-bit KV cache, from the keys and values of the calibration text."""

from contextlib import ExitStack

import torch
from torch import Tensor

from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.formats.scheme import KvFormat
from infopt.core.models.kv_rounding import (
    KEY_SCALE,
    VALUE_SCALE,
    OnUpdate,
    cache_parameter,
    kv_number_format,
    on_update,
)


def record_kv(walk: Walk, form: KvFormat) -> dict[str, Tensor]:
    """Run the loaded block over all calibration batches for the scales of its keys and values.

    Gives `<attention module>.k_scale` and `.v_scale`, float32 [1]: the largest magnitude over that
    of the format, keys after their rotation. Call it before the block's first `settle`: what is
    replayed is not heard. Raises UnsupportedError where the block hands nothing to a cache,
    NumericsError where keys or values are not finite.
    """
    block = walk.names[walk.position]
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for local, module in walk.block.named_modules():
            if cache_parameter(module) is not None:
                name = f"{block}.{local}" if local else block
                handle = on_update(module, _noting(found, name))
                hooks.callback(handle.remove)
        for _ in walk.inputs(()):
            pass
    if not found:
        raise UnsupportedError(
            f"{block} of {walk.artifact.name} hands no keys and values to a cache: "
            "a quantized KV cache needs them",
            "leave out --kv-cache",
        )
    largest = kv_number_format(form).largest
    return {name: _scale(amax, largest, name, walk) for name, amax in found.items()}


def _noting(found: dict[str, Tensor], name: str) -> OnUpdate:
    """Keep the largest magnitudes in `found`."""

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for kind, states in ((KEY_SCALE, keys), (VALUE_SCALE, values)):
            amax = states.abs().amax().to(torch.float32)
            full = f"{name}.{kind}"
            found[full] = torch.maximum(found[full], amax) if full in found else amax
        return keys, values

    return update


def _scale(amax: Tensor, largest: float, name: str, walk: Walk) -> Tensor:
    if not bool(torch.isfinite(amax)):
        kind = "keys" if name.endswith(KEY_SCALE) else "values"
        raise NumericsError(
            f"the {kind} of {name.rpartition('.')[0]} of {walk.artifact.name} are not finite"
        )
    scale = (amax / largest).reshape(1).cpu()
    # Where all is zero, any scale will do but 0, by which others divide.
    return torch.where(scale > 0, scale, torch.ones_like(scale))
