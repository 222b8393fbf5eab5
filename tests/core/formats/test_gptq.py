import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import from_gptq, to_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight


def random_weight(
    bits: int, symmetric: bool, group_size: int | None, outputs: int, columns: int, seed: int
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    number_format = IntegerFormat(bits, symmetric, group_size)
    groups = number_format.groups(columns)
    zeros = torch.randint(1, 2**bits, (outputs, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(number_format.middle)
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (outputs, columns), generator=generator, dtype=torch.uint8),
        scales=torch.rand(outputs, groups, generator=generator).to(torch.float16),
        zeros=zeros,
        group_index=torch.arange(columns, dtype=torch.int32) // (columns // groups),
        format=number_format,
    )


@settings(deadline=None, max_examples=100)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64, 128, None]),
    outputs=st.integers(1, 4),
    columns=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_a_weight_survives_the_round_trip(
    bits: int, symmetric: bool, group_size: int | None, outputs: int, columns: int, seed: int
) -> None:
    weight = random_weight(bits, symmetric, group_size, 32 * outputs, 128 * columns, seed)
    back = from_gptq(to_gptq(weight), weight.format, version=1, where="layer")
    for part in ("codes", "scales", "zeros", "group_index"):
        assert torch.equal(getattr(back, part), getattr(weight, part)), part
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_shapes_and_zeros_are_those_of_other_tools() -> None:
    """A 4-bit layer 512 -> 256 with groups of 64, as gptqmodel 7.6 writes it."""
    tensors = to_gptq(random_weight(4, True, 64, outputs=256, columns=512, seed=0))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((64, 256), torch.int32),
        "qzeros": ((8, 32), torch.int32),
        "scales": ((8, 256), torch.float16),
        "g_idx": ((512,), torch.int32),
    }
    assert bool((tensors["qzeros"] == 0x77777777).all())


@pytest.mark.parametrize("label", [1, 2])
def test_a_symmetric_v2_file_is_known_by_its_values(label: int) -> None:
    weight = random_weight(4, True, 32, outputs=32, columns=64, seed=1)
    tensors = to_gptq(weight)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x88888888 - (1 << 32))
    back = from_gptq(tensors, weight.format, version=label, where="layer")
    assert torch.equal(back.zeros, weight.zeros)


def test_an_asymmetric_file_is_read_by_its_label() -> None:
    weight = random_weight(4, False, 32, outputs=32, columns=64, seed=1)
    back = from_gptq(to_gptq(weight), weight.format, version=2, where="layer")
    assert torch.equal(back.zeros, weight.zeros - 1)


def test_act_order_without_static_groups_is_read() -> None:
    weight = random_weight(4, True, 32, outputs=32, columns=64, seed=2)
    tensors = to_gptq(weight)
    tensors["g_idx"] = torch.randperm(64).to(torch.int32) // 32
    back = from_gptq(tensors, weight.format, version=1, where="layer")
    column = 5
    group = int(tensors["g_idx"][column])
    expected = (weight.codes[:, column].float() - 8) * weight.scales[:, group].float()
    assert torch.equal(back.dequantize()[:, column], expected)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    weight = random_weight(4, True, 32, outputs=32, columns=64, seed=3)
    tensors = to_gptq(weight) | {"g_idx": torch.zeros(63, dtype=torch.int32)}
    with pytest.raises(ArtifactError, match=r"model\.x\.g_idx"):
        from_gptq(tensors, weight.format, version=1, where="model.x")
    tensors["g_idx"] = torch.full((64,), 2, dtype=torch.int32)
    with pytest.raises(ArtifactError, match="names a group beyond"):
        from_gptq(tensors, weight.format, version=1, where="model.x")


def test_scales_are_cast_only_where_nothing_is_lost() -> None:
    weight = random_weight(4, True, 32, outputs=32, columns=64, seed=4)

    def with_scales(scales: torch.Tensor) -> QuantizedWeight:
        parts = (weight.codes, scales, weight.zeros, weight.group_index, weight.format)
        return QuantizedWeight(*parts)

    tensors = to_gptq(with_scales(weight.scales.float()))
    assert tensors["scales"].dtype == torch.float16
    assert torch.equal(tensors["scales"].T, weight.scales)
    with pytest.raises(UnsupportedError, match="exact in float16"):
        to_gptq(with_scales(weight.scales.float() + 2.0**-20))


def test_a_zero_of_zero_is_refused() -> None:
    weight = random_weight(4, False, 32, outputs=32, columns=64, seed=5)
    weight.zeros[0, 0] = 0
    with pytest.raises(UnsupportedError, match="zero of 0"):
        to_gptq(weight)
