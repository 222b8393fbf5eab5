"""The tensors of an AWQ checkpoint of version `gemm`, as AutoAWQ and GPTQModel write it.

For a linear layer [N, K] of 4 bits: qweight int32 [K, N/8], codes packed along N; qzeros int32
[G, N/8], zeros packed in the same way, as they are; scales [G, N], float16 or bfloat16. The eight
nibbles of a word, lowest first, hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of their run of eight.
Groups lie in order: there is no g_idx.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from infopt.core.errors import ArtifactError
from infopt.core.formats.exact import exact_cast, require_order
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.pack import pack, unpack

SUFFIXES = ("qweight", "qzeros", "scales")
BITS = 4
MULTIPLE = 8
"""The outputs of a layer must be divisible by this."""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPES = (torch.float16, torch.bfloat16)


def to_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The three tensors; a symmetric weight has its zeros of 8 written as well.

    Raises UnsupportedError for scales that neither 16-bit dtype holds, and for scattered groups.
    """
    assert weight.format.bits == BITS, "the gemm version has 4 bits"
    require_order(weight.group_index, weight.scales.shape[1], "awq")
    return {
        "qweight": pack(_shuffled(weight.codes.T), BITS, dim=1),
        "qzeros": pack(_shuffled(weight.zeros.T), BITS, dim=1),
        "scales": exact_cast(weight.scales.T, _DTYPES, "the scales of an awq checkpoint"),
    }


def from_awq(
    tensors: Mapping[str, Tensor], number_format: IntegerFormat, where: str
) -> QuantizedWeight:
    """Read the three tensors of the layer `where`; zeros win over a label that says symmetric.

    Raises ArtifactError for shapes that do not fit each other.
    """
    qweight, qzeros, scales = (tensors[suffix] for suffix in SUFFIXES)
    (groups, outputs), columns = scales.shape, qweight.shape[0]
    expected = {"qweight": (columns, outputs // 8), "qzeros": (groups, outputs // 8)}
    for name, right in expected.items():
        if tuple(tensors[name].shape) != right:
            found = list(tensors[name].shape)
            raise ArtifactError(f"{where}.{name} has the shape {found}, not {list(right)}")
    if number_format.groups(columns) != groups or columns % groups:
        raise ArtifactError(f"{where} has {columns} columns in {groups} groups, not as its config")
    zeros = _unshuffled(unpack(qzeros, BITS, dim=1, size=outputs)).T.contiguous()
    if number_format.symmetric and bool((zeros != number_format.middle).any()):
        number_format = IntegerFormat(BITS, False, number_format.group_size)
    return QuantizedWeight(
        codes=_unshuffled(unpack(qweight, BITS, dim=1, size=outputs)).T.contiguous(),
        scales=scales.T.contiguous(),
        zeros=zeros,
        group_index=torch.arange(columns, dtype=torch.int32) // (columns // groups),
        format=number_format,
    )


def _shuffled(codes: Tensor) -> Tensor:
    return codes.reshape(codes.shape[0], -1, len(ORDER))[..., list(ORDER)].flatten(1)


def _unshuffled(codes: Tensor) -> Tensor:
    places = sorted(range(len(ORDER)), key=ORDER.__getitem__)
    return codes.reshape(codes.shape[0], -1, len(ORDER))[..., places].flatten(1)
