"""How many bits a quantized weight takes, told by a config's quantization table alone."""

from collections.abc import Mapping
from typing import Any

# A row's own scale is little: the columns of a row are taken for so many.
_COLUMNS = 4096
_FP8 = ("fp8", "fbgemm_fp8")


def stored_bits(quantization: Mapping[str, Any] | None) -> float | None:
    """Bits of a weight with its scales and zeros; None where weights are plain, or unknown."""
    if not quantization:
        return None
    method = str(quantization.get("quant_method", ""))
    if method in ("gptq", "awq"):
        bits = int(quantization.get("bits") or quantization.get("w_bit") or 4)
        return bits + _scales(quantization.get("group_size") or 128, 16 + bits)
    if method == "compressed-tensors":
        return _compressed(quantization)
    if method in _FP8:
        block = quantization.get("weight_block_size")
        return 8 + (32 / (block[0] * block[1]) if block else _scales(None, 32))
    if method == "bitsandbytes":
        return (
            8 + _scales(None, 32) if quantization.get("load_in_8bit") else 4 + 8 / 64 + 32 / 16384
        )
    return None


def runtime_format(quantization: Mapping[str, Any] | None) -> str:
    """What the runtime makes of it: 'dense', or a word such as 'W4A16' or 'W8A8-int8'."""
    if not quantization:
        return "dense"
    method = str(quantization.get("quant_method", ""))
    if method in ("gptq", "awq"):
        return f"W{int(quantization.get('bits') or quantization.get('w_bit') or 4)}A16"
    if method == "compressed-tensors":
        group = _first_group(quantization)
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        kind = weights.get("type", "int")
        bits = weights.get("num_bits", 8)
        return f"W{bits}A{inputs.get('num_bits', 8)}-{kind}{bits}" if inputs else f"W{bits}A16"
    return method or "unknown"


def _compressed(quantization: Mapping[str, Any]) -> float | None:
    weights = _first_group(quantization).get("weights")
    if not weights:
        return None
    bits = int(weights.get("num_bits", 8))
    extra = 16 if weights.get("symmetric", True) else 16 + bits
    return bits + _scales(weights.get("group_size"), extra)


def _first_group(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = quantization.get("config_groups") or {}
    return next(iter(groups.values()), {})


def _scales(group_size: int | None, bits: int) -> float:
    size = group_size if group_size and group_size > 0 else _COLUMNS
    return bits / size
