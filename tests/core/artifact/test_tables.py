import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.artifact.schemes import kv_format_of, layer_scheme_of
from infopt.core.artifact.tables import quantization_table
from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format
from infopt.core.formats.layout import BLOCK_INPUTS
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import LayerScheme, Layout

LAYERS = [
    f"model.layers.{number}.{part}"
    for number in (0, 1, 10)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]
INT8, INT4 = ActivationFormat("int"), ActivationFormat("int", 4)
INTEGERS = [
    LayerScheme(IntegerFormat(bits, symmetric, size))
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for size in (32, 128, None)
]
COMPRESSED = [
    *(s for s in INTEGERS if s.weight.bits in (4, 8)),
    LayerScheme(IntegerFormat(8, True, None), INT8),
    LayerScheme(IntegerFormat(4, True, 64), INT8),
    LayerScheme(IntegerFormat(4, True, None), INT4),
    LayerScheme(Fp8Format("channel"), ActivationFormat("float")),
    LayerScheme(Fp8Format("tensor"), ActivationFormat("float", 8, "tensor", dynamic=False)),
    LayerScheme(Fp8Format("block"), BLOCK_INPUTS),
    LayerScheme(Fp8Format("channel")),
]
ALONE: list[tuple[Layout, LayerScheme]] = [
    ("awq", LayerScheme(IntegerFormat(4, True, 128))),
    ("awq", LayerScheme(IntegerFormat(4, False, None))),
    ("fp8", LayerScheme(Fp8Format("block"), BLOCK_INPUTS)),
    ("bitsandbytes", LayerScheme(Nf4Format(True))),
    ("bitsandbytes", LayerScheme(Nf4Format(False))),
    (
        "bitsandbytes",
        LayerScheme(IntegerFormat(8, True, None), ActivationFormat("int", outlier_threshold=5.5)),
    ),
]


def written(table: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from config.json."""
    back: dict[str, Any] = json.loads(json.dumps(table, allow_nan=False))
    return back


@given(chosen=st.lists(st.sampled_from(INTEGERS), min_size=9, max_size=9))
def test_gptq_says_each_layers_scheme(chosen: list[LayerScheme]) -> None:
    schemes = dict(zip(LAYERS, chosen, strict=True))
    table = written(quantization_table("gptq", schemes, []))
    assert {layer: layer_scheme_of(table, layer, "here") for layer in LAYERS} == schemes


@given(chosen=st.lists(st.sampled_from(COMPRESSED), min_size=9, max_size=9))
def test_compressed_tensors_says_each_layers_scheme(chosen: list[LayerScheme]) -> None:
    schemes = dict(zip(LAYERS, chosen, strict=True))
    table = written(quantization_table("compressed-tensors", schemes, []))
    assert {layer: layer_scheme_of(table, layer, "here") for layer in LAYERS} == schemes
    formats = {group["format"] for group in table["config_groups"].values()}
    assert table["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")


@pytest.mark.parametrize(("layout", "scheme"), ALONE)
def test_formats_of_one_scheme_say_it(layout: Layout, scheme: LayerScheme) -> None:
    table = written(quantization_table(layout, dict.fromkeys(LAYERS, scheme), []))
    assert table["quant_method"] == layout
    assert layer_scheme_of(table, LAYERS[0], "here") == scheme
    others = {LAYERS[0]: scheme, LAYERS[1]: LayerScheme(IntegerFormat(4, True, 64))}
    with pytest.raises(UnsupportedError, match=r"one scheme for all layers, not: .*; int4 g64 sym"):
        quantization_table(layout, others, [])


SCHEME_OF: dict[Layout, LayerScheme] = {
    "gptq": INTEGERS[0],
    "compressed-tensors": COMPRESSED[0],
    **dict(reversed(ALONE)),
}


@pytest.mark.parametrize("layout", SCHEME_OF)
def test_layers_that_stay_dense_are_named(layout: Layout) -> None:
    schemes = dict.fromkeys(LAYERS[1:], SCHEME_OF[layout])
    table = written(quantization_table(layout, schemes, [LAYERS[0]], meta={"by": "infopt"}))
    assert table["meta"] == {"by": "infopt"}
    listed = {
        "awq": "modules_to_not_convert",
        "compressed-tensors": "ignore",
        "fp8": "modules_to_not_convert",
        "bitsandbytes": "llm_int8_skip_modules",
    }
    if layout == "gptq":
        assert table["dynamic"] == {r"-:^model\.layers\.0\.self_attn\.q_proj$": {}}
        assert table["modules_in_block_to_quantize"] == [LAYERS[1:]]
    else:
        assert table[listed[layout]] == [LAYERS[0], "lm_head"]


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_a_quantized_head_is_no_dense_layer(layout: Layout) -> None:
    schemes = dict.fromkeys([*LAYERS, "lm_head"], LayerScheme(IntegerFormat(4, True, 64)))
    table = quantization_table(layout, schemes, [])
    assert table.get("lm_head", True)
    assert not table.get("ignore") and not table.get("modules_to_not_convert")


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_the_scales_of_a_kv_cache_have_a_place_in_one_format(kv: Any) -> None:
    scheme = LayerScheme(IntegerFormat(4, True, 64))
    table = written(quantization_table("compressed-tensors", {LAYERS[0]: scheme}, [], kv=kv))
    assert kv_format_of(table, "here") == kv
    alone = written(quantization_table("compressed-tensors", {}, [], kv=kv))
    assert kv_format_of(alone, "here") == kv and alone["config_groups"] == {}
    with pytest.raises(UnsupportedError, match="no place for the scales of a KV cache"):
        quantization_table("gptq", {LAYERS[0]: scheme}, [], kv=kv)


def test_one_scheme_is_for_all_linears_and_several_name_theirs() -> None:
    """vLLM takes a fused layer's class, which every Linear is, before its parts' names."""
    first, other = COMPRESSED[0], COMPRESSED[-1]
    alone = quantization_table("compressed-tensors", dict.fromkeys(LAYERS, first), [])
    assert alone["config_groups"]["group_0"]["targets"] == ["Linear"]
    mixed = {LAYERS[0]: first, LAYERS[1]: other, LAYERS[2]: first}
    groups = quantization_table("compressed-tensors", mixed, [])["config_groups"]
    assert groups["group_0"]["targets"] == [LAYERS[0], LAYERS[2]]
    assert groups["group_1"]["targets"] == [LAYERS[1]]


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_compressed_tensors_takes_its_tables(scheme: LayerScheme) -> None:
    """And it would give the scheme the same name."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.format")
    from torch import nn

    schemes = dict.fromkeys(LAYERS, scheme)
    table = written(quantization_table("compressed-tensors", schemes, LAYERS[:1], kv="fp8"))
    config = quantization.QuantizationConfig.model_validate(table)
    group = config.config_groups["group_0"]
    assert compressors.infer_module_format(nn.Linear, group).value == table["format"]
    assert config.kv_cache_scheme.num_bits == 8


@pytest.mark.parametrize("layout", SCHEME_OF)
def test_transformers_takes_its_tables(layout: Layout) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig

    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    schemes = dict.fromkeys(LAYERS, SCHEME_OF[layout])
    table = written(quantization_table(layout, schemes, LAYERS[:0], meta={"by": "infopt"}))
    config = AutoQuantizationConfig.from_dict(table)
    assert config.quant_method == layout
