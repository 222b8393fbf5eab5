"""`quantization_config` as each checkpoint format has it, and as its loaders read it."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import BLOCK, Fp8Format
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import KvFormat, LayerScheme, Layout

_HEAD = "lm_head"


def quantization_table(
    layout: Layout,
    schemes: Mapping[str, LayerScheme],
    ignored: Sequence[str],
    *,
    kv: KvFormat | None = None,
    meta: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The content of `quantization_config` for layers, by their names, of these schemes.

    ignored: linear layers that stay dense; the head is one of them unless it has a scheme.
    meta: how it was made, for people. dtype: the one that bitsandbytes computes in. Raises
    UnsupportedError where the format has one scheme for all layers and there are several, or no
    place for the scales of a KV cache; what it holds of each layer, `why_not` tells.
    """
    if kv is not None and layout != "compressed-tensors":
        raise UnsupportedError(
            f"the {layout} format has no place for the scales of a KV cache",
            "compressed-tensors has: --format compressed-tensors",
        )
    dense = list(dict.fromkeys(name for name in (*ignored, _HEAD) if name not in schemes))
    match layout:
        case "gptq":
            table = _gptq(schemes, [name for name in ignored if name not in schemes])
        case "awq":
            table = _awq(_only(schemes, layout), dense)
        case "compressed-tensors":
            table = _compressed(schemes, dense, kv)
        case "fp8":
            _only(schemes, layout)
            table = _fp8(dense)
        case "bitsandbytes":
            table = _bitsandbytes(_only(schemes, layout), dense, dtype)
    return table | ({"meta": dict(meta)} if meta else {})


def _only(schemes: Mapping[str, LayerScheme], layout: Layout) -> LayerScheme:
    kinds = Counter(schemes.values())
    if len(kinds) != 1:
        found = "; ".join(scheme.describe() for scheme in kinds) or "none"
        raise UnsupportedError(
            f"the {layout} format has one scheme for all layers, not: {found}",
            "gptq and compressed-tensors hold mixed ones",
        )
    return next(iter(kinds))


def _gptq(schemes: Mapping[str, LayerScheme], ignored: Sequence[str]) -> dict[str, Any]:
    """As gptqmodel, vLLM, SGLang and transformers read it.

    Groups lie in order, so desc_act is false: no loader needs g_idx. The most common scheme is
    said once, others by layer.
    """
    common = Counter(schemes.values()).most_common(1)[0][0]
    table: dict[str, Any] = {
        **_integers(common),
        "desc_act": False,
        "lm_head": _HEAD in schemes,
        "quant_method": "gptq",
        "method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    others = {
        f"+:{_exactly(name)}": _integers(scheme)
        for name, scheme in schemes.items()
        if scheme != common
    }
    # What must not be taken for quantized: gptqmodel, vLLM and SGLang look into the first,
    # transformers (optimum) into the second.
    dynamic: dict[str, Any] = others | {f"-:{_exactly(name)}": {} for name in ignored}
    if dynamic:
        table["dynamic"] = dynamic
    if ignored:
        table["modules_in_block_to_quantize"] = [list(schemes)]
    return table


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _integers(scheme: LayerScheme) -> dict[str, Any]:
    form = scheme.weight
    assert isinstance(form, IntegerFormat), "why_not was asked"
    return {"bits": form.bits, "group_size": form.group_size or -1, "sym": form.symmetric}


def _awq(scheme: LayerScheme, dense: Sequence[str]) -> dict[str, Any]:
    said = _integers(scheme)
    return {
        "bits": said["bits"],
        "group_size": said["group_size"],
        "zero_point": not said["sym"],
        "version": "gemm",
        "quant_method": "awq",
        "method": "awq",
        "format": "gemm",
        "checkpoint_format": "gemm",
        "desc_act": False,
        "lm_head": _HEAD not in dense,
        "pack_dtype": "int32",
        # vLLM, SGLang and transformers look into the first, gptqmodel into the second.
        "modules_to_not_convert": list(dense),
        "dynamic": {f"-:{_exactly(name)}": {} for name in dense},
    }


def _compressed(
    schemes: Mapping[str, LayerScheme], dense: Sequence[str], kv: KvFormat | None
) -> dict[str, Any]:
    """As compressed-tensors, vLLM and SGLang read it; a group for each scheme.

    Several groups name their layers, since vLLM would find the class of a fused layer first.
    """
    groups: dict[LayerScheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    formats = {_format(scheme) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                "format": _format(scheme),
                "targets": names if len(groups) > 1 else ["Linear"],
                "weights": _weights(scheme),
                "input_activations": _inputs(scheme.activation) if scheme.activation else None,
                "output_activations": None,
            }
            for index, (scheme, names) in enumerate(groups.items())
        },
        "ignore": list(dense),
        "kv_cache_scheme": None if kv is None else _kv(kv),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _format(scheme: LayerScheme) -> str:
    """The names that compressed-tensors itself gives these schemes."""
    if isinstance(scheme.weight, IntegerFormat):
        return "pack-quantized" if scheme.activation is None else "int-quantized"
    return "naive-quantized" if scheme.activation is None else "float-quantized"


def _weights(scheme: LayerScheme) -> dict[str, Any]:
    match scheme.weight:
        case IntegerFormat(bits=bits, symmetric=symmetric, group_size=size):
            strategy = "group" if size else "channel"
            return _said(bits, "int", strategy, symmetric=symmetric, group_size=size)
        case Fp8Format(strategy=strategy):
            block = list(BLOCK) if strategy == "block" else None
            return _said(8, "float", strategy, block=block)
        case Nf4Format():
            raise AssertionError("why_not was asked")


def _inputs(form: ActivationFormat) -> dict[str, Any]:
    size = form.group_size
    return _said(form.bits, form.kind, form.strategy, dynamic=form.dynamic, group_size=size)


def _kv(kv: KvFormat) -> dict[str, Any]:
    return _said(8, "float" if kv == "fp8" else "int", "tensor")


def _said(
    bits: int,
    kind: str,
    strategy: str,
    *,
    symmetric: bool = True,
    dynamic: bool = False,
    group_size: int | None = None,
    block: list[int] | None = None,
) -> dict[str, Any]:
    """All keys that compressed-tensors writes and every version of it knows."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": block,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _fp8(dense: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
        "modules_to_not_convert": list(dense),
    }


def _bitsandbytes(scheme: LayerScheme, dense: Sequence[str], dtype: str) -> dict[str, Any]:
    form, activation = scheme.weight, scheme.activation
    four = isinstance(form, Nf4Format)
    # A threshold that nothing reaches is written as 0; NF4 has bitsandbytes' default, unused.
    threshold = activation.outlier_threshold if activation else 6.0
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": isinstance(form, Nf4Format) and form.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dense),
        "llm_int8_threshold": 0.0 if threshold in (None, math.inf) else threshold,
    }
