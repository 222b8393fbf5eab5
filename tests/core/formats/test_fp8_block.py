import pytest
import torch
from torch import Tensor

from infopt.core.errors import ArtifactError
from infopt.core.formats.fp8 import Fp8Format, to_fp8
from infopt.core.formats.fp8_block import from_fp8_block, to_fp8_block

BLOCKS = Fp8Format("block")


@pytest.mark.parametrize("shape", [(256, 128), (200, 300), (5, 128)])
def test_a_weight_survives_the_round_trip(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = to_fp8(torch.randn(shape), BLOCKS)
    tensors = to_fp8_block(weight)
    assert tensors["weight"].dtype == torch.float8_e4m3fn
    assert tensors["weight_scale_inv"].dtype == torch.float32
    back = from_fp8_block(tensors, BLOCKS, "layer")
    assert torch.equal(back.codes.float(), weight.codes.float())
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("shape", [(256, 384), (96, 128)])
def test_transformers_reads_the_same_values(shape: tuple[int, int]) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight = to_fp8(torch.randn(shape), BLOCKS)
    tensors = to_fp8_block(weight)
    read = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"])
    assert torch.equal(read, weight.dequantize())


def test_one_scale_for_a_tensor_is_read_under_either_name() -> None:
    weight = to_fp8(torch.randn(8, 16), Fp8Format("tensor"))
    for name in ("weight_scale_inv", "weight_scale"):
        tensors = {"weight": weight.codes, name: weight.scales.squeeze()}
        back = from_fp8_block(tensors, weight.format, "layer")
        assert torch.equal(back.dequantize(), weight.dequantize())


def test_scales_that_are_powers_of_two_are_read() -> None:
    codes = to_fp8(torch.randn(128, 256), BLOCKS).codes
    scales = torch.tensor([[0.5, 4.0]]).to(torch.float8_e8m0fnu)
    back = from_fp8_block({"weight": codes, "weight_scale_inv": scales}, BLOCKS, "layer")
    assert torch.equal(back.dequantize()[:, :128], codes[:, :128].float() * 0.5)
    assert torch.equal(back.dequantize()[:, 128:], codes[:, 128:].float() * 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_scale_inv": None}, "lacks weight_scale_inv"),
        ({"weight_scale_inv": torch.ones(2, 2)}, r"the shape \[2, 2\], not \[1, 2\]"),
        ({"weight_scale_inv": torch.ones(1, 2, dtype=torch.uint8)}, "scales of torch.uint8"),
        ({"weight": torch.ones(128, 256, dtype=torch.int8)}, "a weight of torch.int8"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Tensor | None], named: str) -> None:
    tensors = {**to_fp8_block(to_fp8(torch.randn(128, 256), BLOCKS)), **changes}
    kept = {name: part for name, part in tensors.items() if part is not None}
    with pytest.raises(ArtifactError, match=named):
        from_fp8_block(kept, BLOCKS, "layer")
