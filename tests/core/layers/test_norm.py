import torch

from infopt.core.layers.norm import HeadNorm, RMSNorm


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x), wanted)


def test_head_norm_is_each_head_by_itself() -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(5, 8)
    wanted = torch.stack([RMSNorm(weight[h], 1e-6)(x[:, h]) for h in range(5)], dim=1)
    torch.testing.assert_close(HeadNorm(weight, 1e-6)(x), wanted)
