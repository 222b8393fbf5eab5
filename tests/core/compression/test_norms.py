import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from infopt.core.compression.norms import gain_offset


class Odd(nn.Module):
    """A gain of some other kind."""

    def __init__(self, offset: float = 0.0, power: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.offset, self.power = offset, power

    def forward(self, x: Tensor) -> Tensor:
        gained: Tensor = (
            x / x.norm(dim=-1, keepdim=True) * (self.offset + self.weight) ** self.power
        )
        return gained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gains_of_real_norms(dtype: torch.dtype) -> None:
    assert gain_offset(nn.LayerNorm(8, dtype=dtype)) == 0.0
    assert gain_offset(nn.LayerNorm(8, bias=False, dtype=dtype)) == 0.0
    assert gain_offset(nn.RMSNorm(8, dtype=dtype)) == 0.0
    assert gain_offset(LlamaRMSNorm(8).to(dtype)) == 0.0
    assert gain_offset(Gemma3RMSNorm(8).to(dtype)) == 1.0


@pytest.mark.parametrize(
    "module",
    [
        Odd(offset=2.0),
        Odd(power=2),
        nn.PReLU(8),
        nn.Linear(8, 8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.BatchNorm1d(8).eval(),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
    ],
    ids=str,
)
def test_what_is_no_norm_that_we_know(module: nn.Module) -> None:
    assert gain_offset(Odd()) == 0.0, "the measure of the odd ones"
    assert gain_offset(module) is None


def test_parameters_are_neither_read_nor_changed() -> None:
    norm = nn.LayerNorm(8)
    norm.weight.data.fill_(torch.nan)
    assert gain_offset(norm) == 0.0
    assert bool(norm.weight.isnan().all()) and not bool(norm.bias.any())
    assert gain_offset(nn.LayerNorm(8, device="meta")) == 0.0
