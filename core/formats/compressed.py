"""The tensors of a compressed-tensors checkpoint, as llm-compressor writes it and vLLM reads it.

For a linear layer [N, K], by the `format` of its config group:

pack-quantized    weight_packed int32 [N, K*bits/32], codes packed along K; weight_scale [N, G];
                  weight_shape int64 [2]; asymmetric: weight_zero_point int32 [N*bits/32, G],
                  zeros packed along N. Old act-order files have weight_g_idx int32 [K] as well.
int-quantized     weight int8 [N, K], code - 2^(bits-1), one byte each whatever the bits;
                  weight_scale [N, G]; asymmetric: weight_zero_point int8 [N, G].
float-quantized   weight float8_e4m3fn [N, K]; weight_scale [1], [N, 1] or [N/128, K/128].

The latter two have input_scale [1] where inputs are rounded with a calibrated scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from infopt.core.errors import ArtifactError
from infopt.core.formats.exact import exact_cast, require_order
from infopt.core.formats.fp8 import Fp8Format, Fp8Weight
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.pack import pack, packed_size, unpack

SUFFIXES = (
    "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    "input_scale",
)  # fmt: skip
BITS = (4, 8)
"""The packing of other widths changed between versions of the library."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def to_packed(weight: QuantizedWeight) -> dict[str, Tensor]:
    """pack-quantized; raises UnsupportedError for scattered groups."""
    bits = weight.format.bits
    assert bits in BITS, "only words that hold whole codes"
    require_order(weight.group_index, weight.scales.shape[1], "compressed-tensors")
    tensors = {
        "weight_packed": pack(weight.codes, bits, dim=1),
        "weight_scale": _scales(weight.scales),
        "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if not weight.format.symmetric:
        tensors["weight_zero_point"] = pack(weight.zeros, bits, dim=0)
    return tensors


def to_int(weight: QuantizedWeight, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """int-quantized; raises UnsupportedError for scattered groups."""
    middle = weight.format.middle
    require_order(weight.group_index, weight.scales.shape[1], "compressed-tensors")
    tensors = {
        "weight": (weight.codes.to(torch.int16) - middle).to(torch.int8),
        "weight_scale": _scales(weight.scales),
    }
    if not weight.format.symmetric:
        tensors["weight_zero_point"] = (weight.zeros.to(torch.int16) - middle).to(torch.int8)
    return tensors | _input(input_scale)


def to_float(weight: Fp8Weight, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """float-quantized."""
    scales = _scales(weight.scales)
    return {"weight": weight.codes.contiguous(), "weight_scale": scales} | _input(input_scale)


def from_compressed(
    tensors: Mapping[str, Tensor], form: IntegerFormat | Fp8Format, where: str
) -> QuantizedWeight | Fp8Weight:
    """Read the tensors of the layer `where`, which tell their format by their names and dtypes.

    Raises ArtifactError for tensors that are missing or do not fit each other.
    """
    main = "weight_packed" if "weight_packed" in tensors else "weight"
    needed = {main, "weight_scale"} | ({"weight_shape"} if main == "weight_packed" else set())
    if isinstance(form, IntegerFormat) and not form.symmetric:
        needed.add("weight_zero_point")
    if absent := sorted(needed - set(tensors)):
        raise ArtifactError(f"{where} lacks {absent[0]}")
    expected = {"weight_packed": torch.int32}.get(
        main, torch.int8 if isinstance(form, IntegerFormat) else torch.float8_e4m3fn
    )
    if tensors[main].dtype != expected:
        raise ArtifactError(
            f"{where}.{main} is {tensors[main].dtype}, but its config asks for {expected}"
        )
    if isinstance(form, Fp8Format):
        shape = form.scale_shape(*tensors["weight"].shape)
        scales = _fitting(tensors["weight_scale"], shape, f"{where}.weight_scale")
        return Fp8Weight(tensors["weight"], scales, form)
    if main == "weight_packed":
        return _from_packed(tensors, form, where)
    return _from_int(tensors, form, where)


def _from_packed(tensors: Mapping[str, Tensor], form: IntegerFormat, where: str) -> QuantizedWeight:
    outputs, columns = (int(size) for size in tensors["weight_shape"])
    packed = tensors["weight_packed"]
    right = (outputs, packed_size(columns, form.bits))
    if tuple(packed.shape) != right:
        raise ArtifactError(
            f"{where}.weight_packed has the shape {list(packed.shape)}, not {list(right)}"
        )
    codes = unpack(packed, form.bits, dim=1, size=columns)
    zeros = None
    if not form.symmetric:
        words = tensors["weight_zero_point"]
        stored = (packed_size(outputs, form.bits), form.groups(columns))
        if tuple(words.shape) != stored:
            raise ArtifactError(
                f"{where}.weight_zero_point has the shape {list(words.shape)}, not {list(stored)}"
            )
        zeros = unpack(words, form.bits, dim=0, size=outputs)
    return _weight(codes, tensors, zeros, form, where)


def _from_int(tensors: Mapping[str, Tensor], form: IntegerFormat, where: str) -> QuantizedWeight:
    codes = tensors["weight"].to(torch.int16) + form.middle
    if int(codes.min()) < 0 or int(codes.max()) > form.max_code:
        raise ArtifactError(f"{where}.weight has values beyond {form.bits} bits")
    zeros = None
    if not form.symmetric:
        offsets = tensors["weight_zero_point"].to(torch.int16) + form.middle
        shape = (codes.shape[0], form.groups(codes.shape[1]))
        zeros = _fitting(offsets, shape, f"{where}.weight_zero_point").to(torch.uint8)
    return _weight(codes.to(torch.uint8), tensors, zeros, form, where)


def _weight(
    codes: Tensor,
    tensors: Mapping[str, Tensor],
    zeros: Tensor | None,
    form: IntegerFormat,
    where: str,
) -> QuantizedWeight:
    outputs, columns = codes.shape
    groups = form.groups(columns)
    if columns % groups:
        raise ArtifactError(f"{where}: groups of {form.group_size} do not divide {columns} columns")
    shape = (outputs, groups)
    scales = _fitting(tensors["weight_scale"], shape, f"{where}.weight_scale")
    if zeros is None:
        zeros = torch.full(shape, form.middle, dtype=torch.uint8, device=codes.device)
    order = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    index = tensors.get("weight_g_idx", order)
    if bool((index < 0).all()):  # left as it was initialized: columns in order
        index = order
    if tuple(index.shape) != (columns,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ArtifactError(f"{where}.weight_g_idx does not fit {columns} columns, {groups} groups")
    return QuantizedWeight(codes, scales, zeros, index.to(torch.int32), form)


def _fitting(values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Of the shape it must have; one value may stand for all, [N] for [N, 1]."""
    if values.numel() == 1:
        return values.reshape([1] * len(shape)).expand(shape).contiguous()
    if tuple(values.shape) == shape[:1] and shape[1:] == (1,):
        return values.reshape(shape)
    if tuple(values.shape) != shape:
        raise ArtifactError(f"{name} has the shape {list(values.shape)}, not {list(shape)}")
    return values.contiguous()


def _scales(values: Tensor) -> Tensor:
    return exact_cast(values, _DTYPES, "scales")


def _input(scale: Tensor | None) -> dict[str, Tensor]:
    return {} if scale is None else {"input_scale": _scales(scale.reshape(1))}
