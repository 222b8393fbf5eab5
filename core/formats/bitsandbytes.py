"""The tensors of a bitsandbytes checkpoint, as transformers saves a model loaded with it.

8 bits (LLM.int8; Dettmers et al. 2022, arXiv 2208.07339), a linear layer [N, K]: weight int8
[N, K]; SCB float32 [N], the largest magnitude of each row, w = weight * SCB / 127; weight_format
uint8 [], 0 for rows.

NF4: weight uint8 [N*K/2, 1], two codes a byte, the first in the high nibble; weight.absmax,
weight.quant_map, with double quantization weight.nested_absmax and weight.nested_quant_map;
weight.quant_state.bitsandbytes__nf4, a JSON table as bytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.nf4 import BLOCK, NESTED_BLOCK, Nf4Format, Nf4Weight
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

STATE = "weight.quant_state.bitsandbytes__nf4"
STATE_FP4 = "weight.quant_state.bitsandbytes__fp4"
SUFFIXES_INT8 = ("weight", "SCB", "weight_format")
SUFFIXES_NF4 = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", STATE,
)  # fmt: skip
_LARGEST = 127


def to_int8(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of an 8-bit symmetric weight with a scale per row.

    Raises UnsupportedError where a scale is no float32 magnitude divided by 127; those that come
    from amax / 127, and all of 16 bits, are.
    """
    form = weight.format
    assert form.bits == 8 and form.symmetric and weight.scales.shape[1] == 1, "LLM.int8"
    return {
        "weight": (weight.codes.to(torch.int16) - form.middle).to(torch.int8),
        "SCB": _row_magnitudes(weight.scales[:, 0].to(torch.float32)),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def from_int8(tensors: Mapping[str, Tensor], where: str) -> QuantizedWeight:
    """Read the layer `where`; raises ArtifactError for tensors that do not fit each other.

    The scales are SCB / 127; bitsandbytes itself multiplies by a rounded 1/127, so its weights
    may differ from these in the last bit of float32.
    """
    stored = tensors["weight"]
    if "SCB" not in tensors:
        raise ArtifactError(f"{where} lacks SCB")
    if int(tensors.get("weight_format", torch.tensor(0))) != 0:
        raise UnsupportedError(f"{where}.weight is not stored in rows (weight_format)")
    outputs, columns = stored.shape
    magnitudes = tensors["SCB"].reshape(-1).to(torch.float32)
    if magnitudes.numel() != outputs:
        raise ArtifactError(f"{where}.SCB has {magnitudes.numel()} rows, its weight {outputs}")
    form = IntegerFormat(8, True, None)
    return QuantizedWeight(
        codes=(stored.to(torch.int16) + form.middle).to(torch.uint8),
        scales=(magnitudes / _LARGEST).unsqueeze(1),
        zeros=torch.full((outputs, 1), form.middle, dtype=torch.uint8),
        group_index=torch.zeros(columns, dtype=torch.int32),
        format=form,
    )


def to_nf4(weight: Nf4Weight, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The tensors of an NF4 weight; `dtype` is what bitsandbytes dequantizes it to."""
    codes = weight.codes.flatten()
    assert codes.numel() % 2 == 0, "two codes a byte"
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.codes.shape),
    }
    tensors = {
        "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": weight.quant_map.clone(),
    }
    if weight.nested_absmax is not None and weight.nested_map is not None:
        tensors["weight.nested_absmax"] = weight.nested_absmax
        tensors["weight.nested_quant_map"] = weight.nested_map.clone()
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.offset
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_nf4(tensors: Mapping[str, Tensor], where: str) -> Nf4Weight:
    """Read the layer `where`.

    Raises ArtifactError for tensors that are missing, damaged or do not fit, UnsupportedError for
    blocks of another size.
    """
    state = _state(tensors, where)
    blocks = (state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK))
    if blocks != (BLOCK, NESTED_BLOCK):
        raise UnsupportedError(
            f"{where} has NF4 blocks of {blocks[0]} (nested: {blocks[1]})",
            f"known: {BLOCK} and {NESTED_BLOCK}",
        )
    double = "weight.nested_absmax" in tensors
    needed = SUFFIXES_NF4 if double else ("weight.absmax", "weight.quant_map")
    if absent := [suffix for suffix in needed if suffix not in tensors]:
        raise ArtifactError(f"{where} lacks {absent[0]}")
    shape = _shape(state, where)
    # Some files keep the bytes in words of another dtype (bnb_4bit_quant_storage).
    stored = tensors["weight"].contiguous().flatten().view(torch.uint8)
    codes = torch.stack((stored >> 4, stored & 15), dim=1).flatten()
    size, absmax = shape[0] * shape[1], tensors["weight.absmax"]
    if not 0 <= codes.numel() - size <= 1 or absmax.numel() != -(-size // BLOCK):
        raise ArtifactError(f"{where}.weight and its absmax do not fit the shape {list(shape)}")
    nested = tensors["weight.nested_absmax"] if double else None
    if nested is not None and nested.numel() != -(-absmax.numel() // NESTED_BLOCK):
        raise ArtifactError(f"{where}.weight.nested_absmax has {nested.numel()} values")
    return Nf4Weight(
        codes=codes[:size].reshape(shape),
        absmax=absmax,
        quant_map=tensors["weight.quant_map"],
        nested_absmax=nested,
        nested_map=tensors["weight.nested_quant_map"] if double else None,
        offset=float(state.get("nested_offset", 0.0)),
        format=Nf4Format(double),
    )


def _state(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    if STATE not in tensors:
        raise ArtifactError(f"{where} lacks {STATE}")
    try:
        found = json.loads(bytes(tensors[STATE].tolist()))
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{where}.{STATE} is not a JSON table")
    return found


def _shape(state: Mapping[str, Any], where: str) -> tuple[int, int]:
    found = state.get("shape")
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int for n in found):
        raise ArtifactError(f"{where}.{STATE} has the shape {found!r}, which is no matrix")
    return found[0], found[1]


def _row_magnitudes(scales: Tensor) -> Tensor:
    """The SCB [N] with SCB / 127 == scales, bit by bit: near scales * 127, found by trying."""
    guess = scales * _LARGEST
    upward = torch.full_like(guess, torch.inf)
    found, fits = guess, guess / _LARGEST == scales
    for candidate in (torch.nextafter(guess, upward), torch.nextafter(guess, -upward)):
        right = candidate / _LARGEST == scales
        found = torch.where(fits | ~right, found, candidate)
        fits = fits | right
    if not bool(fits.all()):
        raise UnsupportedError(
            "bitsandbytes stores the largest magnitude of a row, and these scales are none / 127",
            "quantize the original model with method llm-int8, or choose another format",
        )
    return found
