from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.compressed import from_compressed, to_float, to_int, to_packed
from infopt.core.formats.fp8 import Fp8Format, Fp8Weight, to_fp8
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

Maker = Callable[..., QuantizedWeight]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([24, 48, None]),
    outputs=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_integers_survive_the_round_trip(
    make: Maker,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    outputs: int,
    dtype: torch.dtype,
    packed: bool,
    seed: int,
) -> None:
    form = IntegerFormat(bits, symmetric, group_size)
    weight = make(form, outputs, 144, seed, dtype=dtype)
    tensors = to_packed(weight) if packed else to_int(weight)
    back = from_compressed(tensors, form, "layer")
    assert isinstance(back, QuantizedWeight) and back.format == form
    for part in ("codes", "zeros", "group_index"):
        assert torch.equal(getattr(back, part), getattr(weight, part)), part
    assert torch.equal(back.scales.float(), weight.scales.float())


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_floats_survive_the_round_trip(strategy: Any) -> None:
    weight = to_fp8(torch.randn(200, 256), Fp8Format(strategy))
    back = from_compressed(to_float(weight, torch.tensor(0.5)), weight.format, "layer")
    assert isinstance(back, Fp8Weight)
    assert torch.equal(back.codes.float(), weight.codes.float())
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_shapes_and_dtypes_are_those_of_llm_compressor(make: Maker) -> None:
    """A layer 512 -> 256 in groups of 128, asymmetric; and W8A8; as llm-compressor 0.14 writes."""
    packed = to_packed(make(IntegerFormat(4, False, 128), 256, 512, 0, dtype=torch.bfloat16))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in packed.items()} == {
        "weight_packed": (torch.int32, (256, 64)),
        "weight_scale": (torch.bfloat16, (256, 4)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (32, 4)),
    }
    plain = to_int(make(IntegerFormat(8, True, None), 256, 512, 0), torch.tensor([0.25]))
    assert {name: (part.dtype, tuple(part.shape)) for name, part in plain.items()} == {
        "weight": (torch.int8, (256, 512)),
        "weight_scale": (torch.float16, (256, 1)),
        "input_scale": (torch.bfloat16, (1,)),
    }


def theirs(kind: str, bits: int, strategy: str, **said: Any) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **said)
    return quantization.QuantizationScheme(targets=["Linear"], weights=args)


def compressor(name: str) -> Any:
    base = pytest.importorskip("compressed_tensors.compressors")
    return base.BaseCompressor.get_value_from_registry(name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("stored", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_reads_our_integers(
    make: Maker,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    stored: str,
    dtype: torch.dtype,
) -> None:
    """Its arithmetic is that of the scales' dtype: products are rounded to it, as ours are here."""
    form = IntegerFormat(bits, symmetric, group_size)
    weight = make(form, 24, 96, 5, dtype=dtype)
    strategy = "group" if group_size else "channel"
    scheme = theirs("int", bits, strategy, group_size=group_size, symmetric=symmetric)
    tensors = to_packed(weight) if stored == "pack-quantized" else to_int(weight)
    dense = compressor(stored).decompress(tensors, scheme)["weight"]
    assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", ["pack-quantized", "int-quantized"])
def test_we_read_the_integers_of_compressed_tensors(
    bits: int, symmetric: bool, stored: str
) -> None:
    torch.manual_seed(bits)
    scheme = theirs("int", bits, "group", group_size=32, symmetric=symmetric)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    state: dict[str, Tensor] = {
        "weight": torch.randn(20, 96),
        "weight_scale": torch.rand(20, 3) / high + 1 / high,
        "weight_zero_point": torch.randint(low, high, (20, 3), dtype=torch.int8),
    }
    if symmetric:
        state["weight_zero_point"].zero_()
    tensors = compressor(stored).compress(state, scheme)
    back = from_compressed(tensors, IntegerFormat(bits, symmetric, 32), "layer")
    again = compressor(stored).decompress(tensors, scheme)["weight"]
    assert torch.equal(back.dequantize(), again)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_compressed_tensors_reads_our_floats(strategy: Any) -> None:
    torch.manual_seed(0)
    weight = to_fp8(torch.randn(200, 256), Fp8Format(strategy))
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    scheme = theirs("float", 8, strategy, **block)
    tensors = to_float(weight)
    assert tensors["weight_scale"].dtype == torch.bfloat16  # as a bfloat16 model holds it
    # It computes in the dtype of the scale, which a loader sets to the model's.
    tensors["weight_scale"] = tensors["weight_scale"].to(torch.float32)
    dense = compressor("float-quantized").decompress(tensors, scheme)["weight"]
    assert torch.equal(dense, weight.dequantize())


def test_one_scale_stands_for_all_rows(make: Maker) -> None:
    form = IntegerFormat(8, True, None)
    tensors = to_int(make(form, 6, 16, 1)) | {"weight_scale": torch.tensor([0.5])}
    back = from_compressed(tensors, form, "layer")
    assert torch.equal(back.dequantize(), tensors["weight"].float() * 0.5)


def test_scattered_groups_are_read_and_not_written(make: Maker) -> None:
    form = IntegerFormat(4, True, 16)
    weight = make(form, 6, 32, 1)
    index = torch.randperm(32).to(torch.int32) // 16
    tensors = to_packed(weight)
    back = from_compressed(tensors | {"weight_g_idx": index}, form, "layer")
    assert isinstance(back, QuantizedWeight)
    expected = (weight.codes.float() - 8) * weight.scales.float()[:, index.long()]
    assert torch.equal(back.dequantize(), expected)
    with pytest.raises(UnsupportedError, match="scattered"):
        to_packed(back)
    unset = from_compressed(tensors | {"weight_g_idx": torch.full((32,), -1)}, form, "layer")
    assert torch.equal(unset.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_scale": None}, "lacks weight_scale"),
        ({"weight_shape": None}, "lacks weight_shape"),
        ({"weight_zero_point": None}, "lacks weight_zero_point"),
        ({"weight_scale": torch.ones(6, 3)}, r"weight_scale has the shape \[6, 3\]"),
        ({"weight_shape": torch.tensor([6, 64])}, "weight_packed has the shape"),
        ({"weight_zero_point": torch.ones(6, 2, dtype=torch.int32)}, "weight_zero_point has the"),
        ({"weight_packed": torch.ones(6, 4)}, "is torch.float32, but its config asks"),
        ({"weight_g_idx": torch.full((32,), 2)}, "weight_g_idx does not fit"),
    ],
)
def test_what_does_not_fit_is_named(
    make: Maker, changes: dict[str, Tensor | None], named: str
) -> None:
    form = IntegerFormat(4, False, 16)
    tensors: dict[str, Tensor | None] = {**to_packed(make(form, 6, 32, 1)), **changes}
    kept = {name: part for name, part in tensors.items() if part is not None}
    with pytest.raises(ArtifactError, match=named):
        from_compressed(kept, form, "layer")


def test_values_beyond_four_bits_are_refused(make: Maker) -> None:
    tensors = to_int(make(IntegerFormat(8, True, None), 6, 32, 1))
    with pytest.raises(ArtifactError, match="values beyond 4 bits"):
        from_compressed(tensors, IntegerFormat(4, True, None), "layer")
