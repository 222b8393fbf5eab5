import math
from typing import Any

import pytest

from infopt.core.artifact.schemes import gptq_version, kv_format_of, layer_scheme_of, layout_of
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import LayerScheme

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.10.mlp.down_proj"


def compressed(weights: dict[str, Any], inputs: Any = None, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    known = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**known, "config_groups": {"group_0": group}, **changes}


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
F8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
BNB = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (GPTQ, LayerScheme(IntegerFormat(4, True, 64))),
        ({"bits": 3, "group_size": -1, "sym": False}, LayerScheme(IntegerFormat(3, False, None))),
        (GPTQ | {"quant_method": "auto_gptq"}, LayerScheme(IntegerFormat(4, True, 64))),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
            LayerScheme(IntegerFormat(4, False, 64)),
        ),
        (
            {"quant_method": "awq", "bits": 4, "zero_point": False, "version": "GEMM"},
            LayerScheme(IntegerFormat(4, True, 128)),
        ),
        (compressed(W4), LayerScheme(IntegerFormat(4, True, 128))),
        (compressed(W4 | {"strategy": None}), LayerScheme(IntegerFormat(4, True, 128))),
        (
            compressed(W8, TOKENS),
            LayerScheme(IntegerFormat(8, True, None), ActivationFormat("int")),
        ),
        (
            compressed(W8, TOKENS | {"strategy": "tensor", "dynamic": False}),
            LayerScheme(
                IntegerFormat(8, True, None), ActivationFormat("int", 8, "tensor", dynamic=False)
            ),
        ),
        (
            compressed(W4, TOKENS | {"num_bits": 4}, format="int-quantized"),
            LayerScheme(IntegerFormat(4, True, 128), ActivationFormat("int", 4)),
        ),
        (
            compressed(F8, TOKENS | {"type": "float"}, format="float-quantized"),
            LayerScheme(Fp8Format("channel"), ActivationFormat("float")),
        ),
        (
            compressed(
                F8 | {"strategy": "block", "block_structure": [128, 128]},
                TOKENS | {"type": "float", "strategy": "group", "group_size": 128},
            ),
            LayerScheme(Fp8Format("block"), ActivationFormat("float", 8, "group", group_size=128)),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            LayerScheme(Fp8Format("block"), ActivationFormat("float", 8, "group", group_size=128)),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            LayerScheme(Fp8Format("tensor"), ActivationFormat("float", 8, "tensor", dynamic=False)),
        ),
        (
            BNB | {"load_in_8bit": True, "llm_int8_threshold": 5.0},
            LayerScheme(
                IntegerFormat(8, True, None), ActivationFormat("int", outlier_threshold=5.0)
            ),
        ),
        (
            BNB | {"load_in_8bit": True, "llm_int8_threshold": 0.0},
            LayerScheme(
                IntegerFormat(8, True, None), ActivationFormat("int", outlier_threshold=math.inf)
            ),
        ),
        (
            BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            LayerScheme(Nf4Format(double=False)),
        ),
    ],
)
def test_the_tables_of_other_tools_are_read(table: dict[str, Any], expected: LayerScheme) -> None:
    assert layer_scheme_of(table, UP, "here") == expected


@pytest.mark.parametrize(
    ("dynamic", "bits"),
    [
        ({r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 3}}, 3),
        ({r"+:.*\.up_proj": {"bits": 8}}, 8),
        ({r".*\.up_proj": {"bits": 8}}, 8),
        ({r"+:.*\.down_proj": {"bits": 8}}, 4),
        ({r"+:up_proj": {"bits": 8}}, 4),  # matched from the start of the name
        ({r"+:.*\.mlp": {"bits": 2}, r"+:.*\.up_proj": {"bits": 8}}, 2),  # the first that matches
        ({r"-:.*\.down_proj": {}, r"+:.*up_proj$": {"bits": 8}}, 8),
        ({r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 3}}, 4),
    ],
)
def test_what_gptqmodel_says_of_single_layers_is_read(dynamic: dict[str, Any], bits: int) -> None:
    scheme = layer_scheme_of(GPTQ | {"dynamic": dynamic}, UP, "here")
    assert scheme.weight == IntegerFormat(bits, True, 64)


def test_a_layers_group_is_found_by_name_then_pattern_then_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": W4 | {"num_bits": bits}}

    groups = {"a": group(8, "Linear"), "b": group(4, r"re:.*mlp\."), "c": group(8, UP)}
    table = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    table = table | {"config_groups": groups}
    assert layer_scheme_of(table, UP, "here").weight.bits == 8
    assert layer_scheme_of(table, DOWN, "here").weight.bits == 4
    assert layer_scheme_of(table, "lm_head", "here").weight.bits == 8
    del groups["a"]
    with pytest.raises(ArtifactError, match="no config group for lm_head"):
        layer_scheme_of(table, "lm_head", "here")


KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def test_the_format_of_the_kv_cache_is_read() -> None:
    assert kv_format_of(compressed(W4), "here") is None
    assert kv_format_of(compressed(W4, kv_cache_scheme=KV), "here") == "fp8"
    assert kv_format_of(compressed(W4, kv_cache_scheme=KV | {"type": "int"}), "here") == "int8"


@pytest.mark.parametrize(
    "changes", [{"num_bits": 4}, {"symmetric": False}, {"dynamic": True}, {"strategy": "attn_head"}]
)
def test_other_kv_caches_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="kv_cache_scheme"):
        kv_format_of(compressed(W4, kv_cache_scheme=KV | changes), "here")


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"quant_method": "hqq"}, "'hqq'.*known: gptq, awq"),
        ({"quant_method": "modelopt"}, "modelopt"),
        (GPTQ | {"bits": 5}, "bits 5"),
        (GPTQ | {"group_size": "many"}, "many"),
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "'gemv'"),
        (compressed(W4, format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (compressed(W4, format="mxfp4-pack-quantized"), "mxfp4-pack-quantized"),
        (compressed(W4, format="marlin-24"), "marlin-24"),
        (compressed(W4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(W4, transform_config={"config_groups": {}}), "transform_config"),
        (compressed(W4 | {"num_bits": 3}), "3-bit int weights by group"),
        (compressed(F8 | {"strategy": "tensor_group"}), "tensor_group"),
        (compressed(F8 | {"strategy": "block", "block_structure": [64, 64]}), "64, 64"),
        (compressed(W8, TOKENS | {"symmetric": False}), "asymmetrically"),
        (compressed(W8, TOKENS | {"num_bits": 6}), "6-bit int by token"),
        (compressed(W8, TOKENS | {"dynamic": "local"}), "by token"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "64"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "static inputs",
        ),
        (BNB | {"load_in_4bit": True}, "fp4 weights"),
    ],
)
def test_what_cannot_be_read_is_named(table: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        layer_scheme_of(table, UP, "here")


def test_the_version_of_gptq_is_its_label() -> None:
    assert gptq_version({}, "here") == gptq_version({"format": "gptq"}, "here") == 1
    assert gptq_version({"checkpoint_format": "gptq_v2"}, "here") == 2
    with pytest.raises(UnsupportedError, match="marlin"):
        gptq_version({"checkpoint_format": "marlin"}, "here")
    assert layout_of({}, "here") == "gptq"


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(ArtifactError, match="pattern"):
        layer_scheme_of(GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, UP, "here")
