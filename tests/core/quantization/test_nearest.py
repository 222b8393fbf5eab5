import torch
from torch import Tensor

from infopt.core.formats.number import IntegerFormat, QuantizedWeight
from infopt.core.quantization.nearest import group_grids, quantize_nearest


def rounded(weight: Tensor, number_format: IntegerFormat, *, mse: bool = True) -> QuantizedWeight:
    return quantize_nearest(weight, number_format, group_grids(weight, number_format, mse=mse))


def test_shapes_and_dtypes() -> None:
    weight = torch.randn(6, 128)
    found = rounded(weight, IntegerFormat(4, True, 32))
    assert found.codes.shape == (6, 128) and found.codes.dtype == torch.uint8
    assert found.scales.shape == (6, 4) and found.scales.dtype == torch.float16
    assert found.zeros.shape == (6, 4) and found.group_index.tolist()[::32] == [0, 1, 2, 3]


def test_each_code_is_the_nearest() -> None:
    weight = torch.randn(5, 64)
    found = rounded(weight, IntegerFormat(3, False, 32))
    error = (found.dequantize() - weight).abs()
    for step in (-1, 1):
        moved = (found.codes.int() + step).clamp(0, 7)
        other = (moved - found.zeros.int().repeat_interleave(32, 1)) * found.scales.float()[
            :, found.group_index.long()
        ]
        assert bool((error <= (other - weight).abs() + 1e-6).all())


def test_a_row_is_one_group_without_a_size() -> None:
    found = rounded(torch.randn(4, 96), IntegerFormat(8, True, None))
    assert found.scales.shape == (4, 1)


def test_its_own_output_is_a_fixed_point() -> None:
    number_format = IntegerFormat(8, True, 32)
    once = rounded(torch.randn(4, 64), number_format).dequantize()
    again = rounded(once, number_format).dequantize()
    assert float((once - again).abs().max()) <= 0.02 * float(once.abs().max())
