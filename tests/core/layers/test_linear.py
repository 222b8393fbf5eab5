import torch

from infopt.core.layers.linear import Linear, fused


def test_fused_is_the_parts_side_by_side() -> None:
    x = torch.randn(3, 8)
    parts = [Linear(torch.randn(n, 8), torch.randn(n)) for n in (4, 2, 5)]
    wanted = torch.cat([part(x) for part in parts], dim=-1)
    torch.testing.assert_close(fused(parts)(x), wanted)
    assert fused(parts).nbytes == sum(part.nbytes for part in parts)


def test_fused_without_bias() -> None:
    parts = [Linear(torch.randn(4, 8)), Linear(torch.randn(2, 8))]
    assert fused(parts).bias is None
