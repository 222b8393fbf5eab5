import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infopt.core.errors import UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.layout import SUFFIXES, encode, why_not
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.formats.scheme import LayerScheme, Layout, StoredWeight, WeightFormat

Maker = Callable[..., QuantizedWeight]
INT8 = ActivationFormat("int", 8)
INT4 = ActivationFormat("int", 4)
FP8 = ActivationFormat("float", 8)
STATIC = ActivationFormat("float", 8, "tensor", dynamic=False)
GROUPS = ActivationFormat("float", 8, "group", group_size=128)
OUTLIERS = ActivationFormat("int", 8, outlier_threshold=6.0)
LAYOUTS: tuple[Layout, ...] = ("gptq", "awq", "compressed-tensors", "fp8", "bitsandbytes")

W4, W3, W4A = IntegerFormat(4, True, 32), IntegerFormat(3, True, 32), IntegerFormat(4, False, 32)
W8R, W4R = IntegerFormat(8, True, None), IntegerFormat(4, True, None)
HELD: list[tuple[WeightFormat, ActivationFormat | None, set[str]]] = [
    (W4, None, {"gptq", "awq", "compressed-tensors"}),
    (W4A, None, {"gptq", "awq", "compressed-tensors"}),
    (W4R, None, {"gptq", "awq", "compressed-tensors"}),
    (W3, None, {"gptq"}),
    (IntegerFormat(2, True, 64), None, {"gptq"}),
    (IntegerFormat(8, True, 64), None, {"gptq", "compressed-tensors"}),
    (W8R, None, {"gptq", "compressed-tensors"}),
    (W8R, INT8, {"compressed-tensors"}),
    (W8R, OUTLIERS, {"bitsandbytes"}),
    (W4R, INT8, {"compressed-tensors"}),
    (W4, INT8, {"compressed-tensors"}),
    (W4R, INT4, {"compressed-tensors"}),
    (W8R, INT4, set()),
    (W8R, FP8, set()),
    (Fp8Format("channel"), FP8, {"compressed-tensors"}),
    (Fp8Format("channel"), None, {"compressed-tensors"}),
    (Fp8Format("channel"), INT8, set()),
    (Fp8Format("tensor"), STATIC, {"compressed-tensors"}),
    (Fp8Format("block"), GROUPS, {"compressed-tensors", "fp8"}),
    (Fp8Format("block"), None, {"compressed-tensors"}),
    (Nf4Format(True), None, {"bitsandbytes"}),
    (Nf4Format(False), None, {"bitsandbytes"}),
    (Nf4Format(True), INT8, set()),
]


def stored(make: Maker, form: WeightFormat) -> StoredWeight:
    """A weight 128 x 256 of the format."""
    match form:
        case IntegerFormat():
            return make(form, 128, 256, 0, lowest_zero=1)
        case Fp8Format():
            return to_fp8(torch.randn(128, 256), form)
        case Nf4Format():
            return quantize_nf4(torch.randn(128, 256), form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "activation", "holders"), HELD)
def test_what_why_not_lets_through_is_encoded(
    make: Maker,
    layout: Layout,
    form: WeightFormat,
    activation: ActivationFormat | None,
    holders: set[str],
) -> None:
    scheme, weight = LayerScheme(form, activation), stored(make, form)
    clause = why_not(layout, scheme, 128, 256)
    assert (clause is None) == (layout in holders)
    if clause is None:
        tensors = encode(layout, weight, activation=activation)
        assert tensors and set(tensors) <= set(SUFFIXES[layout])
        assert all(part.is_contiguous() for part in tensors.values())
    else:
        with pytest.raises(UnsupportedError, match=f"{layout} cannot hold this layer"):
            encode(layout, weight, activation=activation)


@pytest.mark.parametrize(
    ("layout", "scheme", "shape", "named"),
    [
        ("gptq", LayerScheme(W4), (40, 256), "divisible by 32, not 40 x 256"),
        ("gptq", LayerScheme(W4R), (64, 48), "divisible by 32, not 64 x 48"),
        ("gptq", LayerScheme(W4), (64, 48), "groups of 32 do not divide its 48 inputs"),
        ("gptq", LayerScheme(W4, INT8), (64, 64), "no rounded inputs"),
        ("awq", LayerScheme(W4), (12, 64), "outputs divisible by 8, not 12"),
        ("awq", LayerScheme(W3), (8, 64), "integers of 4 bits"),
        ("compressed-tensors", LayerScheme(W3), (8, 64), "3 bits by .* 4 or 8 bits only"),
        ("compressed-tensors", LayerScheme(W8R, OUTLIERS), (8, 64), "columns of outliers"),
        ("compressed-tensors", LayerScheme(Nf4Format()), (8, 64), "no NF4"),
        ("compressed-tensors", LayerScheme(Fp8Format("block")), (8, 64), "blocks of 128"),
        ("fp8", LayerScheme(Fp8Format("channel"), FP8), (128, 128), "128 x 128"),
        ("fp8", LayerScheme(Fp8Format("block")), (128, 128), "inputs rounded to float8"),
        ("fp8", LayerScheme(Fp8Format("block"), GROUPS), (192, 128), "divisible by 128, not 192"),
        ("fp8", LayerScheme(Fp8Format("block"), GROUPS), (128, 192), "its 192 inputs"),
        ("bitsandbytes", LayerScheme(Nf4Format()), (8, 63), "its inputs are odd"),
        ("bitsandbytes", LayerScheme(W8R), (8, 64), "scaled per token"),
        ("bitsandbytes", LayerScheme(W8R, INT8), (8, 64), "a threshold for outliers"),
        ("bitsandbytes", LayerScheme(W4), (8, 64), "scale per row"),
    ],
)
def test_the_clause_says_why(
    layout: Layout, scheme: LayerScheme, shape: tuple[int, int], named: str
) -> None:
    clause = why_not(layout, scheme, *shape)
    assert clause is not None and re.search(named, clause)


def test_few_outputs_make_one_block_of_fp8() -> None:
    scheme = LayerScheme(Fp8Format("block"), GROUPS)
    assert why_not("fp8", scheme, 64, 256) is None


def test_integers_are_packed_unless_their_inputs_are_rounded(make: Maker) -> None:
    weight = make(W8R, 8, 64, 0)
    assert "weight_packed" in encode("compressed-tensors", weight)
    plain = encode("compressed-tensors", weight, torch.tensor(0.5), activation=INT8)
    assert plain["weight"].dtype == torch.int8 and plain["input_scale"].tolist() == [0.5]


def test_a_zero_of_zero_does_not_fit_into_gptq(make: Maker) -> None:
    weight = make(W4A, 32, 64, 0)
    zeros: Tensor = weight.zeros.clone()
    zeros[3, 1] = 0
    other = QuantizedWeight(weight.codes, weight.scales, zeros, weight.group_index, W4A)
    with pytest.raises(UnsupportedError, match="none for a zero of 0"):
        encode("gptq", other)
    assert set(encode("awq", other)) == {"qweight", "qzeros", "scales"}
