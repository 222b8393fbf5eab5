"""What a checkpoint holds, told from its headers: its parameters and its quantization."""

from collections.abc import Mapping, Sequence
from typing import Any

from infopt.core.artifact.headers import TensorHeader
from infopt.core.errors import InfoptError

# Scales, zeros and other companions of quantized weights; never parameters.
_COMPANIONS = (
    ".qzeros", ".scales", ".g_idx",  # gptq, awq
    ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",  # compressed-tensors
    ".weight_global_scale", ".input_global_scale", ".input_scale", ".input_zero_point",
    ".weight_scale_inv", ".activation_scale",  # fp8
    ".weight_scale_2", ".pre_quant_scale",  # modelopt
    ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point",
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format",
)  # fmt: skip
_BNB_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


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
        return header.nbytes * 8 // _bits(quantization, module)
    if kind == "weight_packed":
        return header.nbytes * 8 // _bits(quantization, module)
    if any(f"{name}.{state}" in headers for state in _BNB_STATES):
        return header.nbytes * 2  # two 4-bit values a byte, whatever the dtype of the words
    return header.numel


def _bits(quantization: Mapping[str, Any], module: str) -> int:
    """Of a packed layer; 4 where the config is of a kind that infopt cannot read."""
    from infopt.core.artifact.schemes import layer_scheme_of  # it knows torch, this file does not

    try:
        return layer_scheme_of(quantization, module, "config.json").weight.bits
    except InfoptError:
        return 4


def describe_quantization(quantization: Mapping[str, Any] | None) -> str | None:
    """In a few words, such as 'gptq 4-bit g64 sym'; None for a plain checkpoint."""
    if not quantization:
        return None
    method = str(quantization.get("quant_method") or quantization.get("method") or "gptq")
    match method:
        case "gptq" | "awq":
            symmetric = quantization.get("sym", not quantization.get("zero_point", False))
            said = [quantization, *_overrides(quantization)]
            widths = [entry.get("bits") for entry in said]
            sizes = [entry.get("group_size") for entry in said]
            return _words(method, widths, sizes, symmetric)
        case "compressed-tensors":
            return _describe_compressed(quantization)
        case "bitsandbytes" if quantization.get("load_in_4bit"):
            return f"bitsandbytes {quantization.get('bnb_4bit_quant_type', 'fp4')}"
        case "bitsandbytes":
            return "bitsandbytes 8-bit"
        case "fp8" if quantization.get("weight_block_size"):
            return f"fp8 {'x'.join(map(str, quantization['weight_block_size']))}"
        case _:
            bits, size = quantization.get("bits"), quantization.get("group_size")
            return _words(method, [bits], [size], None)


def _overrides(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a gptq config says of single layers."""
    dynamic = quantization.get("dynamic")
    entries = dynamic.items() if isinstance(dynamic, Mapping) else ()
    return [said for key, said in entries if not key.startswith("-:") and isinstance(said, Mapping)]


def _describe_compressed(quantization: Mapping[str, Any]) -> str:
    groups = quantization.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    weights = [group.get("weights") or {} for group in found]
    kind = f"compressed-tensors {quantization.get('format', '')}".strip()
    words = _words(
        kind,
        [said.get("num_bits") for said in weights],
        [said.get("group_size") for said in weights],
        weights[0].get("symmetric") if weights else None,
    )
    parts = [words]
    inputs = {_number(group.get("input_activations")) for group in found} - {""}
    if inputs:
        parts.append(f"{'/'.join(sorted(inputs))} inputs")
    if cache := _number(quantization.get("kv_cache_scheme")):
        parts.append(f"{cache} KV cache")
    return ", ".join(parts)


def _number(said: object) -> str:
    """'int8', 'fp8' or '' where nothing is said."""
    if not isinstance(said, Mapping):
        return ""
    return f"{'fp' if said.get('type') == 'float' else 'int'}{said.get('num_bits', 8)}"


def _words(
    method: str, bits: Sequence[object], group_sizes: Sequence[object], symmetric: object
) -> str:
    words = [method]
    widths = sorted({width for width in bits if isinstance(width, int)})
    if widths:
        words.append(f"{'/'.join(map(str, widths))}-bit")
    sizes = sorted({size for size in group_sizes if isinstance(size, int)})
    if sizes:
        words.append("/".join("channel" if size <= 0 else f"g{size}" for size in sizes))
    if symmetric is not None:
        words.append("sym" if symmetric else "asym")
    return " ".join(words)
