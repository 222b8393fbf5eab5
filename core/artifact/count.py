"""What a checkpoint holds, told from its headers: its parameters and its quantization."""

from collections.abc import Mapping
from typing import Any

from infopt.core.artifact.headers import TensorHeader

# Scales, zeros and other companions of quantized weights; never parameters.
_COMPANIONS = (
    ".qzeros", ".scales", ".g_idx",  # gptq, awq
    ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",  # compressed-tensors
    ".weight_global_scale", ".input_global_scale", ".input_scale", ".input_zero_point",
    ".weight_scale_inv", ".weight_scale_2", ".pre_quant_scale",  # fp8, modelopt
    ".k_scale", ".v_scale", ".q_scale",
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format",
)  # fmt: skip


def count_parameters(
    headers: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None,
) -> int:
    """Logical parameters: a packed linear is outputs x inputs, tied embeddings count once."""
    tied = bool(config.get("tie_word_embeddings", False))
    has_embedding = any(name.endswith("embed_tokens.weight") for name in headers)
    total = 0
    for name, header in headers.items():
        if name.endswith(_COMPANIONS) or ".quant_state." in name:
            continue
        if tied and has_embedding and name == "lm_head.weight":
            continue
        total += _logical_size(name, header, headers, quantization or {})
    return total


def _logical_size(
    name: str,
    header: TensorHeader,
    headers: Mapping[str, TensorHeader],
    quantization: Mapping[str, Any],
) -> int:
    module, _, kind = name.rpartition(".")
    if kind == "qweight":
        scales, groups = headers.get(f"{module}.scales"), headers.get(f"{module}.g_idx")
        if quantization.get("quant_method") == "awq" and scales:  # [K, N/8], scales [K/G, N]
            return header.shape[0] * scales.shape[-1]
        if groups:  # gptq: [K/8, N], g_idx [K]
            return groups.shape[0] * header.shape[-1]
        return header.nbytes * 8 // int(quantization.get("bits", 4))
    if kind == "weight_packed":
        return header.nbytes * 8 // _compressed_bits(quantization)
    if any(other.startswith(f"{name}.quant_state.") for other in _bnb_states(name, headers)):
        return header.numel * 2  # two 4-bit values a byte
    return header.numel


def _bnb_states(name: str, headers: Mapping[str, TensorHeader]) -> list[str]:
    known = (f"{name}.quant_state.bitsandbytes__nf4", f"{name}.quant_state.bitsandbytes__fp4")
    return [state for state in known if state in headers]


def _compressed_weights(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The `weights` scheme of the first group of a compressed-tensors config."""
    groups = quantization.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _compressed_bits(quantization: Mapping[str, Any]) -> int:
    return int(_compressed_weights(quantization).get("num_bits") or 4)


def describe_quantization(quantization: Mapping[str, Any] | None) -> str | None:
    """In a few words, such as 'gptq 4-bit g64 sym'; None for a plain checkpoint."""
    if not quantization:
        return None
    method = str(quantization.get("quant_method") or quantization.get("method") or "gptq")
    match method:
        case "gptq" | "awq":
            symmetric = quantization.get("sym", not quantization.get("zero_point", False))
            return _words(
                method, quantization.get("bits"), quantization.get("group_size"), symmetric
            )
        case "compressed-tensors":
            weights = _compressed_weights(quantization)
            kind = f"{method} {quantization.get('format', '')}".strip()
            return _words(
                kind, weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric")
            )
        case "bitsandbytes" if quantization.get("load_in_4bit"):
            return f"bitsandbytes {quantization.get('bnb_4bit_quant_type', 'fp4')}"
        case "bitsandbytes":
            return "bitsandbytes 8-bit"
        case _:
            return _words(method, quantization.get("bits"), quantization.get("group_size"), None)


def _words(method: str, bits: object, group_size: object, symmetric: object) -> str:
    words = [method]
    if isinstance(bits, int):
        words.append(f"{bits}-bit")
    if isinstance(group_size, int):
        words.append("channel" if group_size <= 0 else f"g{group_size}")
    if symmetric is not None:
        words.append("sym" if symmetric else "asym")
    return " ".join(words)
