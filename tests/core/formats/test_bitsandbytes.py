import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.bitsandbytes import STATE, from_int8, from_nf4, to_int8, to_nf4
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

Maker = Callable[..., QuantizedWeight]
ROWS = IntegerFormat(8, True, None)


@pytest.fixture(scope="session")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def random(outputs: int, columns: int, seed: int) -> Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(
    outputs=st.integers(1, 9),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_rows_survive_the_round_trip(
    make: Maker, outputs: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    weight = make(ROWS, outputs, columns, seed, dtype=dtype)
    back = from_int8(to_int8(weight), "layer")
    for part in ("codes", "zeros", "group_index"):
        assert torch.equal(getattr(back, part), getattr(weight, part)), part
    assert torch.equal(back.scales, weight.scales.float()) and back.format == ROWS


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 6))
def test_the_scales_of_llm_int8_survive(make: Maker, seed: int, exponent: int) -> None:
    """amax / 127 in float32, of any magnitude."""
    weight = make(ROWS, 50, 8, seed)
    scales = random(50, 8, seed).mul(2.0**exponent).abs().amax(dim=1, keepdim=True) / 127
    exact = QuantizedWeight(weight.codes, scales, weight.zeros, weight.group_index, ROWS)
    assert torch.equal(from_int8(to_int8(exact), "layer").scales, scales)


def test_scales_that_are_no_magnitude_are_refused(make: Maker) -> None:
    """Several float32 scales share one magnitude: of neighbours, one must fail."""
    weight = make(ROWS, 300, 8, 0, dtype=torch.float32)
    scales = (1.5 + torch.arange(300) * 2.0**-23).unsqueeze(1)
    other = QuantizedWeight(weight.codes, scales, weight.zeros, weight.group_index, ROWS)
    with pytest.raises(UnsupportedError, match="largest magnitude"):
        to_int8(other)


def test_the_rows_of_bitsandbytes_are_read(bnb: Any) -> None:
    """It multiplies by a rounded 1/127: within two units in the last place of float32."""
    dense = random(24, 64, 0)
    codes, magnitudes, _ = bnb.int8_vectorwise_quant(dense.half())
    tensors = {
        "weight": codes,
        "SCB": magnitudes,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    back = from_int8(tensors, "layer")
    theirs = bnb.int8_vectorwise_dequant(codes, magnitudes)
    assert torch.allclose(back.dequantize(), theirs, rtol=2.5e-7, atol=0)
    again = to_int8(back)
    assert torch.equal(again["weight"], codes)
    assert torch.equal(again["SCB"] / 127, magnitudes / 127)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"SCB": None}, ArtifactError, "lacks SCB"),
        ({"SCB": torch.ones(3)}, ArtifactError, "SCB has 3 rows"),
        ({"weight_format": torch.tensor(2)}, UnsupportedError, "not stored in rows"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    make: Maker, changes: dict[str, Tensor | None], error: type[Exception], named: str
) -> None:
    tensors: dict[str, Tensor | None] = {**to_int8(make(ROWS, 4, 8, 0)), **changes}
    with pytest.raises(error, match=named):
        from_int8({name: part for name, part in tensors.items() if part is not None}, "layer")


@settings(deadline=None, max_examples=40)
@given(
    outputs=st.integers(1, 9),
    columns=st.integers(1, 80),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_nf4_survives_the_round_trip(outputs: int, columns: int, double: bool, seed: int) -> None:
    weight = quantize_nf4(random(outputs, 2 * columns, seed), Nf4Format(double))
    back = from_nf4(to_nf4(weight), "layer")
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.absmax, weight.absmax)
    assert (back.offset, back.format) == (weight.offset, weight.format)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bitsandbytes_reads_our_nf4(bnb: Any, double: bool, dtype: torch.dtype) -> None:
    weight = quantize_nf4(random(48, 130, 3), Nf4Format(double))
    tensors = to_nf4(weight, dtype)
    parts = {f"layer.{name}": part for name, part in tensors.items() if name != "weight"}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    read = bnb.dequantize_4bit(tensors["weight"], state)
    assert read.dtype == dtype and torch.equal(read, weight.dequantize(dtype))


@pytest.mark.parametrize("double", [True, False])
def test_the_nf4_of_bitsandbytes_is_read(bnb: Any, double: bool) -> None:
    packed, state = bnb.quantize_4bit(
        random(48, 130, 4), quant_type="nf4", compress_statistics=double
    )
    tensors = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    expected = bnb.dequantize_4bit(packed, state)
    for storage in (torch.uint8, torch.bfloat16):
        back = from_nf4(tensors | {"weight": packed.flatten().view(storage)}, "layer")
        assert back.format == Nf4Format(double)
        assert torch.equal(back.dequantize(), expected)


def table(**changes: Any) -> Tensor:
    weight = to_nf4(quantize_nf4(random(4, 64, 0), Nf4Format(True)))
    said = json.loads(bytes(weight[STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({STATE: None}, ArtifactError, "lacks weight.quant_state"),
        ({STATE: torch.tensor([255], dtype=torch.uint8)}, ArtifactError, "not a JSON table"),
        ({STATE: table(blocksize=128)}, UnsupportedError, "blocks of 128"),
        ({STATE: table(shape=[4])}, ArtifactError, "no matrix"),
        ({STATE: table(shape=[4, 128])}, ArtifactError, r"do not fit the shape \[4, 128\]"),
        ({"weight.absmax": None}, ArtifactError, "lacks weight.absmax"),
        ({"weight.nested_absmax": torch.ones(2)}, ArtifactError, "nested_absmax has 2 values"),
    ],
)
def test_nf4_that_does_not_fit_is_named(
    changes: dict[str, Tensor | None], error: type[Exception], named: str
) -> None:
    tensors: dict[str, Tensor | None] = {
        **to_nf4(quantize_nf4(random(4, 64, 0), Nf4Format(True))),
        **changes,
    }
    with pytest.raises(error, match=named):
        from_nf4({name: part for name, part in tensors.items() if part is not None}, "layer")
