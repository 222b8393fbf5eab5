import pytest
import torch
from torch import Tensor, nn

from infopt.core.errors import UnsupportedError
from infopt.core.layers.sparse import is_two_of_four, to_semi_structured


def two_of_four(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    groups = torch.randn(outputs * inputs // 4, 4)
    groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0.0)
    return groups.reshape(outputs, inputs).to(dtype)


def test_a_pattern_is_seen() -> None:
    weight = two_of_four(8, 16)
    assert is_two_of_four(weight)
    weight[3, :4] = 1.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(4, 6)) and not is_two_of_four(torch.zeros(4))


def layer(weight: Tensor, device: str = "cpu") -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device=device)
    linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
    return linear


def test_where_there_are_no_kernels_it_is_said() -> None:
    model = nn.Sequential(layer(two_of_four(64, 64)))
    with pytest.raises(UnsupportedError, match=r"0 is on cpu, and only NVIDIA"):
        to_semi_structured(model)


def test_what_does_not_fit_is_left_alone() -> None:
    dense, narrow = layer(torch.randn(64, 64)), layer(two_of_four(8, 16))
    tied, twin = layer(two_of_four(64, 64)), nn.Linear(64, 64)
    twin.weight = tied.weight
    assert to_semi_structured(nn.Sequential(dense, narrow, tied, twin)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_products_are_those_of_the_dense_weight(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    weight = two_of_four(128, 256, dtype)
    model = nn.Sequential(layer(weight, "cuda"))
    x = torch.randn(32, 256, dtype=dtype, device="cuda")
    with torch.inference_mode():
        wanted = model(x)
        assert to_semi_structured(model) == 1
        found = model(x)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_float32_is_refused() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    with pytest.raises(UnsupportedError, match="float16"):
        to_semi_structured(nn.Sequential(layer(two_of_four(64, 64), "cuda")))
