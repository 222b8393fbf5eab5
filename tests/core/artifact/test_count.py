from pathlib import Path

import pytest

from infopt.core.artifact.count import count_parameters, describe_quantization
from infopt.core.artifact.headers import TensorHeader

GPTQ, AWQ, BNB = ({"quant_method": word} for word in ("gptq", "awq", "bitsandbytes"))


def header(dtype: str, *shape: int) -> TensorHeader:
    size = {"int32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1, "float32": 4}[dtype]
    count = 1
    for length in shape:
        count *= length
    return TensorHeader(Path("x"), dtype, shape, count * size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_counts_outputs_times_inputs(bits: int) -> None:
    headers = {
        "l.qweight": header("int32", 96 * bits // 32, 64),
        "l.qzeros": header("int32", 3, 64 * bits // 32),
        "l.scales": header("float16", 3, 64),
        "l.g_idx": header("int32", 96),
        "l.bias": header("float16", 64),
    }
    config = {"quant_method": "gptq", "bits": bits}
    assert count_parameters(headers, {}, config) == 96 * 64 + 64
    del headers["l.g_idx"]
    assert count_parameters(headers, {}, config) == 96 * 64 + 64


def test_awq_and_compressed_tensors_and_nf4() -> None:
    awq = {"l.qweight": header("int32", 96, 8), "l.scales": header("float16", 3, 64)}
    assert count_parameters(awq, {}, {"quant_method": "awq", "bits": 4}) == 96 * 64
    packed = {
        "l.weight_packed": header("int32", 64, 12),
        "l.weight_scale": header("bfloat16", 64, 3),
        "l.weight_shape": header("int32", 2),
    }
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    assert count_parameters(packed, {}, config) == 64 * 96
    assert describe_quantization(config) == "compressed-tensors pack-quantized 4-bit g32 sym"
    nf4 = {
        "l.weight": header("uint8", 64 * 96 // 2, 1),
        "l.weight.absmax": header("uint8", 96),
        "l.weight.quant_map": header("float32", 16),
        "l.weight.quant_state.bitsandbytes__nf4": header("uint8", 100),
    }
    assert count_parameters(nf4, {}, {"quant_method": "bitsandbytes"}) == 64 * 96


def test_tied_embeddings_count_once() -> None:
    headers = {
        "model.embed_tokens.weight": header("bfloat16", 10, 4),
        "lm_head.weight": header("bfloat16", 10, 4),
    }
    assert count_parameters(headers, {"tie_word_embeddings": True}, None) == 40
    assert count_parameters(headers, {"tie_word_embeddings": False}, None) == 80


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, None),
        ({}, None),
        (GPTQ | {"bits": 4, "group_size": 64, "sym": True}, "gptq 4-bit g64 sym"),
        (GPTQ | {"bits": 8, "group_size": -1, "sym": False}, "gptq 8-bit channel asym"),
        (AWQ | {"bits": 4, "group_size": 128, "zero_point": True}, "awq 4-bit g128 asym"),
        (BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes nf4"),
        (BNB | {"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 128x128"),
        (
            GPTQ | {"bits": 4, "group_size": 64, "sym": True, "dynamic": {"+:a": {"bits": 3}}},
            "gptq 3/4-bit g64 sym",
        ),
        (GPTQ | {"bits": 4, "sym": True, "dynamic": {"-:a": {}}}, "gptq 4-bit sym"),
    ],
)
def test_description(config: dict[str, object] | None, words: str | None) -> None:
    assert describe_quantization(config) == words


def test_mixed_and_rounded_inputs_are_described() -> None:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    inputs = {"num_bits": 8, "type": "int"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {"targets": ["a"], "weights": weights, "input_activations": inputs},
            "group_1": {"targets": ["b"], "weights": weights | {"num_bits": 4, "group_size": 64}},
        },
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    expected = "compressed-tensors mixed-precision 4/8-bit g64 sym, int8 inputs, fp8 KV cache"
    assert describe_quantization(config) == expected


def test_packed_layers_of_different_bits_are_counted() -> None:
    def group(bits: int, target: str) -> dict[str, object]:
        weights = {"num_bits": bits, "group_size": 32, "strategy": "group"}
        return {"targets": [target], "weights": weights}

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group(4, "a"), "group_1": group(8, "b")},
    }
    headers = {
        "a.weight_packed": header("int32", 64, 12),
        "b.weight_packed": header("int32", 64, 24),
    }
    assert count_parameters(headers, {}, config) == 2 * 64 * 96
