"""The formats that `infopt bench kernels` times: each a native layer, torch's, and a reference."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.layers.choice import NativeChoice
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection, fused
from infopt.core.layers.native import NativeGroups, NativeInt8, NativeLinear
from infopt.core.layers.quantized import in_tiles, pack
from infopt.kernels.cpu import dense, groups, int8
from infopt.kernels.cpu.native import Native
from infopt.kernels.gemm.scratch import Scratch

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight as the native kernel holds it, and as torch's do."""

    native: Projection
    torchs: dict[str, Projection]
    reference: Callable[[Tensor], Tensor]

    def copy(self) -> "Pair":
        """The same in memory of its own."""
        torchs = {name: _copied(layer) for name, layer in self.torchs.items()}
        return replace(self, native=_copied(self.native), torchs=torchs)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 2 and not value.is_contiguous():
            return value.t().clone().t()
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {field.name: _copied(getattr(value, field.name)) for field in fields(value)}
        made = copy.copy(value)
        for name, part in found.items():
            object.__setattr__(made, name, part)
        return made
    return value


@dataclass(frozen=True, slots=True)
class Form:
    name: str
    dtype: torch.dtype
    kind: str
    """What is multiplied: the dtype whose matrix product is the limit of many rows."""
    tolerance: float
    """Of the largest difference from the reference, as a share of its largest value."""
    build: Callable[[Native, int, int], Pair]


def _dense(dtype: torch.dtype) -> Callable[[Native, int, int], Pair]:
    def build(native: Native, n: int, k: int) -> Pair:
        linear = Linear(torch.randn(n, k).to(dtype))
        found = NativeChoice(native, dtype, None).settle(linear)
        assert isinstance(found, NativeLinear)
        torchs: dict[str, Projection] = {"F.linear": linear}
        if dtype == torch.float32:
            torchs["F.linear, stored by input"] = fused([linear])
        return Pair(found, torchs, lambda x: dense.reference(x, found.weight, None))

    return build


def _groups(bits: int, group: int | None, dtype: torch.dtype) -> Callable[[Native, int, int], Pair]:
    def build(native: Native, n: int, k: int) -> Pair:
        form = IntegerFormat(bits, symmetric=True, group_size=group)
        count = form.groups(k)
        stored = QuantizedWeight(
            codes=torch.randint(0, form.max_code + 1, (n, k), dtype=torch.uint8),
            scales=torch.rand(n, count).add_(0.5).half(),
            zeros=torch.full((n, count), form.middle, dtype=torch.uint8),
            group_index=torch.arange(k, dtype=torch.int32) // (k // count),
            format=form,
        )
        linear = pack(stored, None, dtype=dtype, device=_CPU, scratch=Scratch(), by_rows=True)
        assert linear is not None
        found = NativeChoice(native, dtype, None).settle(linear)
        assert isinstance(found, NativeGroups)
        tiled = in_tiles(linear) if dtype == torch.bfloat16 else linear
        torchs: dict[str, Projection] = {"dequantize and F.linear": linear}
        if tiled is not linear:
            torchs = {"_weight_int4pack_mm, dequantized from 33 rows on": tiled}
        return Pair(found, torchs, lambda x: groups.reference(x, found.weight, None))

    return build


def _int8(native: Native, n: int, k: int) -> Pair:
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    linear = Int8Linear(codes, torch.rand(n).add_(0.5), ActivationFormat("int"))
    found = NativeChoice(native, torch.bfloat16, None).settle(linear)
    assert isinstance(found, NativeInt8)

    def reference(x: Tensor) -> Tensor:
        return int8.reference(int8.reference_steps(x, found.grid), found.weight, None, x.dtype)

    return Pair(found, {"_int_mm, rounded by torch": linear}, reference)


# Sums of float32 in another order; a unit of bfloat16's last place; integers to the last bit.
_F32, _BF16 = 1e-5, 2**-7
FORMS = (
    Form("bfloat16", torch.bfloat16, "bfloat16", _BF16, _dense(torch.bfloat16)),
    Form("float32", torch.float32, "float32", _F32, _dense(torch.float32)),
    Form("W4A16 g64", torch.bfloat16, "bfloat16", _BF16, _groups(4, 64, torch.bfloat16)),
    Form("W3A16 g64", torch.bfloat16, "bfloat16", _BF16, _groups(3, 64, torch.bfloat16)),
    Form("W2A16 g64", torch.bfloat16, "bfloat16", _BF16, _groups(2, 64, torch.bfloat16)),
    Form("W8A16 channel", torch.bfloat16, "bfloat16", _BF16, _groups(8, None, torch.bfloat16)),
    Form("W4A32 g64", torch.float32, "float32", _F32, _groups(4, 64, torch.float32)),
    Form("W8A8", torch.bfloat16, "int8", 0.0, _int8),
)
