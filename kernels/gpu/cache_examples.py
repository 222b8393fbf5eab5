"""What lies between the projection and attention, as models launch it."""

import torch

from infopt.kernels.attention.eight_bits import STORAGE
from infopt.kernels.gpu.cache import new_cache
from infopt.kernels.gpu.example import Example, Launch
from infopt.kernels.gpu.rope_cache import HeadWeights, Turn, rope_and_write
from infopt.kernels.gpu.tile import Card, Tile

_BF16 = torch.bfloat16
_CANDIDATES = tuple(
    Tile({"BLOCK_H": heads}, warps, 1) for heads in (1, 2, 4, 8, 16, 64) for warps in (1, 2, 4, 8)
)


def _build(
    device: torch.device,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    held: torch.dtype,
    norm: bool,
) -> Launch:
    every = heads + 2 * kv_heads
    qkv = torch.ones(tokens, every, head_dim, dtype=_BF16, device=device)
    cache = new_cache(-(-tokens // 16), 16, kv_heads, head_dim, held, device)
    slots = torch.arange(tokens, device=device)
    cos, sin = torch.ones(2, tokens, 1, head_dim, dtype=_BF16, device=device)
    weight = torch.ones(heads + kv_heads, head_dim, dtype=_BF16, device=device)
    weights = HeadWeights(weight, 1e-6) if norm else None

    def launch(card: Card) -> None:
        rope_and_write(card, qkv, kv_heads, cache, slots, Turn(cos, sin), weights)

    return launch


def _example(
    name: str,
    tokens: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    held: torch.dtype = _BF16,
    norm: bool = False,
) -> Example:
    return Example(
        name=f"rotation and cache, {name}",
        kernel="rope_and_cache",
        key={"heads": heads + 2 * kv_heads, "head_dim": head_dim},
        build=lambda device: _build(device, tokens, heads, kv_heads, head_dim, held, norm),
        candidates=_CANDIDATES,
    )


EXAMPLES = (
    _example("tokens", 32),
    _example("prompt", 4096),
    _example("norms", 32, norm=True),
    _example("heads of 64", 4096, heads=9, kv_heads=3, head_dim=64),
    _example("heads of 256", 4096, heads=16, kv_heads=16, head_dim=256),
    *(_example(f"to {str(held).removeprefix('torch.')}", 4096, held=held) for held in STORAGE),
)
