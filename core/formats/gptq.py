"""The tensors of a GPTQ checkpoint, v1 (as AutoGPTQ wrote them) and v2 (as GPTQModel may).

For a linear layer [N, K]: qweight int32 [K*bits/32, N], codes packed along K; qzeros int32
[G, N*bits/32], zeros packed along N, which v1 stores minus one; scales float16 [G, N];
g_idx int32 [K], the group of each input column.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.exact import exact_cast
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.pack import WORD, pack, packed_size, unpack

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
MULTIPLE = WORD
"""Both sides of a layer must be divisible by this."""


def to_gptq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The four tensors of a v1 checkpoint.

    Raises UnsupportedError for a zero of 0, since v1 stores zero - 1, and for scales that
    float16 does not hold exactly.
    """
    bits = weight.format.bits
    if int(weight.zeros.min()) < 1:
        raise UnsupportedError(
            "the gptq format stores zeros minus one, so it has none for a zero of 0",
            "awq and compressed-tensors have",
        )
    return {
        "qweight": pack(weight.codes.T, bits, dim=0),
        "qzeros": pack(weight.zeros.T - 1, bits, dim=1),
        "scales": exact_cast(weight.scales.T, (torch.float16,), "the scales of a gptq checkpoint"),
        "g_idx": weight.group_index.to(torch.int32),
    }


def from_gptq(
    tensors: Mapping[str, Tensor], number_format: IntegerFormat, *, version: int, where: str
) -> QuantizedWeight:
    """Read the four tensors of the layer `where`; g_idx may be absent where groups lie in order.

    A symmetric layer says by its values which version it is, and they win over `version`:
    files exist whose label is wrong. Raises ArtifactError for shapes that do not fit each other.
    """
    bits = number_format.bits
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, outputs = scales.shape
    columns = qweight.shape[0] * WORD // bits
    group_index = tensors.get("g_idx")
    if group_index is None:
        group_index = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    _check(qweight, qzeros, scales, group_index, bits, where)
    stored = unpack(qzeros, bits, dim=1, size=outputs).T
    if number_format.symmetric:
        version = _version_by_value(stored, number_format.middle, version)
    # Computed modulo 2^bits: some writers let a zero of 0 wrap to all ones.
    zeros = stored if version == 2 else (stored + 1) & number_format.max_code
    return QuantizedWeight(
        codes=unpack(qweight, bits, dim=0, size=columns).T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=zeros.contiguous(),
        group_index=group_index.to(torch.int32),
        format=number_format,
    )


def _version_by_value(stored: Tensor, middle: int, version: int) -> int:
    if bool((stored == middle - 1).all()):
        return 1
    if bool((stored == middle).all()):
        return 2
    return version


def _check(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_index: Tensor, bits: int, where: str
) -> None:
    groups, outputs = scales.shape
    columns = qweight.shape[0] * WORD // bits
    expected = {
        "qweight": (qweight.shape, (packed_size(columns, bits), outputs)),
        "qzeros": (qzeros.shape, (groups, packed_size(outputs, bits))),
        "g_idx": (group_index.shape, (columns,)),
    }
    for name, (found, right) in expected.items():
        if tuple(found) != right:
            raise ArtifactError(
                f"{where}.{name} has the shape {list(found)}; the other tensors fit {list(right)}"
            )
    if int(group_index.min()) < 0 or int(group_index.max()) >= groups:
        raise ArtifactError(f"{where}.g_idx names a group beyond the {groups} that have scales")
