import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.awq import from_awq, to_awq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

Maker = Callable[..., QuantizedWeight]


@settings(deadline=None, max_examples=50)
@given(
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64, None]),
    outputs=st.integers(1, 5),
    columns=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_a_weight_survives_the_round_trip(
    make: Maker,
    symmetric: bool,
    group_size: int | None,
    outputs: int,
    columns: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    form = IntegerFormat(4, symmetric, group_size)
    weight = make(form, 8 * outputs, 64 * columns, seed, dtype=dtype)
    back = from_awq(to_awq(weight), form, "layer")
    assert back.format == form
    for part in ("codes", "zeros", "group_index"):
        assert torch.equal(getattr(back, part), getattr(weight, part)), part
    assert torch.equal(back.scales.float(), weight.scales.float())
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_nibbles_have_the_order_of_the_gemm_kernel() -> None:
    """One word by hand: outputs 0..7 have the codes 0..7, nibble i holds output ORDER[i]."""
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).repeat(1, 4)
    weight = QuantizedWeight(
        codes,
        torch.ones(8, 1).half(),
        torch.full((8, 1), 8, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int32),
        IntegerFormat(4, True, None),
    )
    tensors = to_awq(weight)
    assert tensors["qweight"].tolist() == [[0x75316420]] * 4
    assert tensors["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]
    assert {name: tuple(part.shape) for name, part in tensors.items()} == {
        "qweight": (4, 1),
        "qzeros": (1, 1),
        "scales": (1, 8),
    }


@pytest.fixture(scope="session")
def packing() -> ModuleType:
    """gptqmodel's own packing, read as one file: the package takes long to import."""
    package = importlib.util.find_spec("gptqmodel")
    if package is None or package.origin is None:
        pytest.skip("gptqmodel is not installed")
    file = Path(package.origin).parent / "quantization/awq/utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing_utils", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptqmodel_packs_and_reads_the_same_words(
    make: Maker, packing: ModuleType, symmetric: bool
) -> None:
    weight = make(IntegerFormat(4, symmetric, 32), 40, 96, 0)
    ours = to_awq(weight)
    codes, zeros = (part.T.contiguous().int() for part in (weight.codes, weight.zeros))
    qweight, qzeros = packing.pack_awq(codes, zeros, 4)
    assert torch.equal(ours["qweight"], qweight) and torch.equal(ours["qzeros"], qzeros)
    dense = packing.dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"], 4, 32)
    assert torch.equal(dense.T, weight.dequantize(torch.float16))


def test_zeros_win_over_a_label_that_says_symmetric(make: Maker) -> None:
    weight = make(IntegerFormat(4, False, 32), 8, 64, 1)
    back = from_awq(to_awq(weight), IntegerFormat(4, True, 32), "layer")
    assert not back.format.symmetric and torch.equal(back.dequantize(), weight.dequantize())


def test_what_awq_cannot_hold_is_refused(make: Maker) -> None:
    weight = make(IntegerFormat(4, True, 32), 8, 64, 2, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="exact in float16 or bfloat16"):
        to_awq(weight)
    ordered = make(IntegerFormat(4, True, 32), 8, 64, 2)
    scattered = QuantizedWeight(
        ordered.codes, ordered.scales, ordered.zeros, ordered.group_index.flip(0), ordered.format
    )
    with pytest.raises(UnsupportedError, match="scattered"):
        to_awq(scattered)


def test_shapes_that_do_not_fit_are_refused_by_name(make: Maker) -> None:
    form = IntegerFormat(4, True, 32)
    tensors = to_awq(make(form, 16, 64, 3))
    with pytest.raises(ArtifactError, match=r"x\.qzeros"):
        from_awq(tensors | {"qzeros": tensors["qzeros"][:, :1]}, form, "x")
    with pytest.raises(ArtifactError, match="64 columns in 2 groups"):
        from_awq(tensors, IntegerFormat(4, True, 64), "x")
