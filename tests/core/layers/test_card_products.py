"""Layers by a GPU's kernels: what the layers they stand for compute."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.nf4 import Nf4Format, quantize_nf4
from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.int8 import Int8Linear
from infopt.core.layers.linear import Linear, Projection
from infopt.core.layers.norm import LayerNorm, RMSNorm
from infopt.core.layers.quantized import QuantizedLinear, pack
from infopt.core.layers.rounded import RoundedLinear
from infopt.kernels.gemm.scratch import Scratch
from infopt.kernels.gpu.tile import A100, H100, Card

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.interpreted
CPU, BF16, F32 = torch.device("cpu"), torch.bfloat16, torch.float32
OUTPUTS, INPUTS = 40, 256
TOLERANCE = {F32: 1e-5, BF16: 1.6e-2}
"""As a share of the largest result; the weight is rounded to bfloat16 by one side only."""


@pytest.fixture
def card() -> Card:
    return Card.with_shipped(**H100)


def integers(
    bits: int, group: int | None, dtype: torch.dtype, *, symmetric: bool = True, mixed: bool = False
) -> QuantizedLinear:
    form = IntegerFormat(bits, symmetric, group)
    groups = form.groups(INPUTS)
    index = torch.arange(INPUTS, dtype=torch.int32) // (INPUTS // groups)
    zeros = torch.full((OUTPUTS, groups), form.middle, dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, form.max_code + 1, zeros.shape, dtype=torch.uint8)
    weight = QuantizedWeight(
        codes=torch.randint(0, form.max_code + 1, (OUTPUTS, INPUTS), dtype=torch.uint8),
        scales=(torch.rand(OUTPUTS, groups) + 0.5).half(),
        zeros=zeros,
        group_index=index[torch.randperm(INPUTS)] if mixed else index,
        format=form,
    )
    bias = torch.randn(OUTPUTS).to(dtype)
    found = pack(weight, bias, dtype=dtype, device=CPU, scratch=Scratch(), by_rows=True)
    assert found is not None
    return found


def nf4(dtype: torch.dtype, *, double: bool = True, inputs: int = INPUTS) -> QuantizedLinear:
    weight = quantize_nf4(torch.randn(OUTPUTS, inputs), Nf4Format(double))
    found = pack(weight, None, dtype=dtype, device=CPU, scratch=Scratch())
    assert found is not None
    return found


def float8(strategy: str, dtype: torch.dtype) -> QuantizedLinear:
    form = Fp8Format(strategy)  # type: ignore[arg-type]
    weight = to_fp8(torch.randn(OUTPUTS, INPUTS), form)
    found = pack(weight, None, dtype=dtype, device=CPU, scratch=Scratch())
    assert found is not None
    return found


def int8(activation: ActivationFormat, **more: Tensor) -> Int8Linear:
    codes = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    return Int8Linear(codes, torch.rand(OUTPUTS) + 0.5, activation, torch.randn(OUTPUTS), **more)


LAYERS = {
    "4 bits": lambda dtype: integers(4, 64, dtype),
    "4 bits, zeros": lambda dtype: integers(4, 128, dtype, symmetric=False),
    "4 bits, columns mixed": lambda dtype: integers(4, 32, dtype, mixed=True),
    "8 bits": lambda dtype: integers(8, None, dtype),
    "2 bits": lambda dtype: integers(2, 32, dtype),
    "3 bits": lambda dtype: integers(3, 64, dtype),
    "3 bits, zeros, columns mixed": lambda dtype: integers(
        3, 128, dtype, symmetric=False, mixed=True
    ),
    "NormalFloat": nf4,
    "NormalFloat, absmax as they are": lambda dtype: nf4(dtype, double=False),
    "NormalFloat, side by side": lambda dtype: SideBySide((nf4(dtype), nf4(dtype))),
    "float8, tensor": lambda dtype: float8("tensor", dtype),
    "float8, channel": lambda dtype: float8("channel", dtype),
    "float8, block": lambda dtype: float8("block", dtype),
    "int8": lambda dtype: int8(ActivationFormat("int")),
    "int8, static": lambda dtype: int8(
        ActivationFormat("int", strategy="tensor", dynamic=False), input_scale=torch.tensor([0.02])
    ),
    "int8, outliers": lambda dtype: int8(ActivationFormat("int", outlier_threshold=2.0)),
    "float8 of float8": lambda dtype: RoundedLinear(
        float8("channel", dtype), ActivationFormat("float")
    ),
    "float8 of float8, static": lambda dtype: RoundedLinear(
        float8("tensor", dtype), ActivationFormat("float", strategy="tensor", dynamic=False),
        torch.tensor(0.01),
    ),
    "float8 of float8, blocks": lambda dtype: RoundedLinear(
        float8("block", dtype), ActivationFormat("float", strategy="group", group_size=128)
    ),
    "side by side": lambda dtype: SideBySide(
        (
            integers(4, 64, dtype),
            int8(ActivationFormat("int")),
            Linear(torch.ones(3, INPUTS, dtype=dtype)),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 9, 80])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_what_they_stand_for(
    name: str, dtype: torch.dtype, rows: int, card: Card
) -> None:
    from infopt.core.layers.card_products import card_product

    torch.manual_seed(0)
    layer: Projection = LAYERS[name](dtype)
    found = card_product(card, layer)
    assert type(found).__name__.startswith("Card") or isinstance(found, SideBySide)
    x = torch.randn(rows, INPUTS).to(dtype)
    wanted, y = layer(x).double(), found(x)
    assert y.dtype == dtype
    tolerance = TOLERANCE[dtype] * float(wanted.abs().max())
    torch.testing.assert_close(y.double(), wanted, atol=tolerance, rtol=0)
    assert found.nbytes > 0


def test_integers_are_as_torch_has_them_to_the_last_bit(card: Card) -> None:
    from infopt.core.layers.card_products import card_product

    torch.manual_seed(0)
    for activation in (ActivationFormat("int"), ActivationFormat("int", bits=8)):
        layer, x = replace(int8(activation), bias=None), torch.randn(20, INPUTS)
        assert torch.equal(card_product(card, layer)(x), layer(x))


def test_what_has_no_kernel_stays_torchs(card: Card) -> None:
    from infopt.core.layers.card_products import CardChoice, card_product

    for layer in (Linear(torch.ones(4, 8)), integers(4, 16, F32), nf4(F32, inputs=96)):
        assert card_product(card, layer) is layer
    norm = LayerNorm(torch.ones(4), torch.ones(4), 1e-5)
    assert CardChoice(card).norm(norm) is norm


def test_older_cards_multiply_rounded_inputs_in_16_bits() -> None:
    from infopt.core.layers.card_products import CardFp8, card_product

    torch.manual_seed(0)
    layer = RoundedLinear(float8("channel", BF16), ActivationFormat("float"))
    found = card_product(Card.with_shipped(**A100), layer)
    assert isinstance(found, RoundedLinear) and isinstance(found.linear, CardFp8)
    x = torch.randn(5, INPUTS).bfloat16()
    torch.testing.assert_close(found(x), layer(x), atol=1.0, rtol=1.6e-2)


def test_normal_floats_side_by_side_are_one_product(card: Card) -> None:
    from infopt.core.layers.card_products import CardIntegers, card_product

    parts = tuple(nf4(F32) for _ in range(3))
    found = card_product(card, SideBySide(parts))
    assert isinstance(found, CardIntegers) and found.weight.shape == (3 * OUTPUTS, INPUTS)
    mixed = card_product(card, SideBySide((nf4(F32), integers(4, 64, F32))))
    assert isinstance(mixed, SideBySide)


def test_rows_of_fixed_layers_do_not_depend_on_one_another(card: Card) -> None:
    from infopt.core.layers.card_products import card_product

    torch.manual_seed(0)
    x = torch.randn(70, INPUTS).bfloat16()
    layers = [
        replace(integers(4, 64, BF16), fixed=True),
        replace(float8("block", BF16), fixed=True),
        replace(int8(ActivationFormat("int", outlier_threshold=2.0)), fixed=True),
    ]
    for layer in layers:
        found = card_product(card, layer)
        whole = found(x)
        for row in (0, 17, 69):
            assert torch.equal(found(x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_norms_and_gates(dtype: torch.dtype, card: Card) -> None:
    from infopt.core.layers.card_products import CardChoice

    torch.manual_seed(0)
    norm = RMSNorm(torch.rand(96).to(dtype), 1e-5)
    x = torch.randn(2, 3, 96).to(dtype)
    tolerance = TOLERANCE[dtype]
    choice = CardChoice(card)
    torch.testing.assert_close(choice.norm(norm)(x), norm(x), atol=tolerance, rtol=tolerance)
    gate, up = x[0].chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    found = choice.gate("silu")(x[0])
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)
