"""Attention as models launch it: tokens, chunks, trees; heads of 64 to 256; 8 bits."""

from dataclasses import dataclass
from typing import Any

import torch

from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu.cache import fill_with_noise, new_cache
from infopt.kernels.gpu.example import Example, Launch
from infopt.kernels.gpu.paged_attention import (
    Launch as Chosen,
)
from infopt.kernels.gpu.paged_attention import Part, Tree, paged_attention
from infopt.kernels.gpu.plan import plan_part
from infopt.kernels.gpu.tile import Card, Tile

_BLOCK = 16
_SCALED = Scores(0.1)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a launch; as Llama-3-8B has it where nothing else is said."""

    lengths: tuple[int, ...]
    context: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    held: torch.dtype | None = None
    scores: Scores = _SCALED
    tree: bool = False
    fixed: bool = False
    block: int = _BLOCK
    tile: Tile | None = None
    """In place of the one that the card has."""

    @property
    def launch(self) -> Chosen:
        return Chosen(
            queries=max(self.lengths),
            group=self.heads // self.kv_heads,
            head_dim=self.head_dim,
            held=self.held or self.dtype,
            window=self.scores.window is not None,
            tree=self.tree,
            fixed=self.fixed,
        )


def _build(shape: _Shape, device: torch.device) -> Launch:
    requests, width = len(shape.lengths), -(-shape.context // shape.block)
    held = shape.held or shape.dtype
    cache = new_cache(requests * width, shape.block, shape.kv_heads, shape.head_dim, held, device)
    fill_with_noise(cache, shape.kv_heads, shape.head_dim)
    tokens, columns = sum(shape.lengths), shape.heads + 2 * shape.kv_heads
    qkv = torch.ones(tokens, columns, shape.head_dim, dtype=shape.dtype, device=device)
    query = qkv[:, : shape.heads]
    out = torch.empty(query.shape, dtype=shape.dtype, device=device)
    tree = None
    if shape.tree:
        seen = torch.ones(tokens, max(shape.lengths), dtype=torch.uint8, device=device)
        tree = Tree(seen, torch.zeros(tokens, dtype=torch.int32, device=device))
    tables = [range(r * width, (r + 1) * width) for r in range(requests)]
    planned: dict[str, Part] = {}

    def launch(card: Card) -> None:
        tile = shape.tile or shape.launch.tile(card)
        key = f"{card.name} {tile}"
        if key not in planned:  # once a tile: a plan is made once for all layers of a step
            planned[key] = plan_part(
                card, tile, tables, [shape.context] * requests, shape.lengths,
                heads=shape.heads, kv_heads=shape.kv_heads, device=device, fixed=shape.fixed,
            )  # fmt: skip
        paged_attention(
            card, query, cache, shape.kv_heads, planned[key], shape.scores, tile, out, tree
        )

    return launch


def _candidates(rows: int) -> tuple[Tile, ...]:
    """What the tuner tries for so many rows: no tile has more than twice the rows that there are,
    nor fewer than a product of the tensor cores."""
    fitting = [m for m in (16, 32, 64, 128) if m == 16 or m // 2 < rows]
    return tuple(
        Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
        for m in fitting[-2:]
        for n in (32, 64, 128)
        for warps in ((4, 8) if m >= 64 else (2, 4))
        for stages in (2, 3, 4)
    )


def _example(name: str, shape: _Shape, wants: tuple[str, ...] = (), since: int = 80) -> Example:
    return Example(
        name=f"attention, {name}",
        kernel="paged_attention",
        key=shape.launch.key,
        build=lambda device: _build(shape, device),
        candidates=_candidates(int(shape.launch.key["rows"])) if shape.tile is None else (),
        wants=wants,
        since=since,
    )


_TOKENS = (1,) * 32
_SMALL: dict[str, Any] = {"heads": 9, "kv_heads": 3, "head_dim": 64}
_PHI: dict[str, Any] = {"heads": 32, "kv_heads": 32, "head_dim": 80}
_DESCRIPTORS = Tile({"BLOCK_M": 128, "BLOCK_N": 128, "TMA": 1}, 8, 2)
EXAMPLES = (
    _example("tokens", _Shape(_TOKENS, 2048), ("HMMA",)),
    _example("one token, split keys", _Shape((1,), 16384), ("HMMA",)),
    _example("tokens, head of 64", _Shape(_TOKENS, 2048, **_SMALL), ("HMMA",)),
    _example("tokens, head of 80", _Shape(_TOKENS, 2048, **_PHI), ("HMMA",)),
    _example("tokens, float16", _Shape(_TOKENS, 2048, dtype=torch.float16), ("HMMA",)),
    _example("tokens, float32", _Shape(_TOKENS, 2048, dtype=torch.float32)),
    _example("tokens, int8", _Shape(_TOKENS, 2048, held=torch.int8), ("HMMA",)),
    _example("tokens, float8", _Shape(_TOKENS, 2048, held=torch.float8_e4m3fn), ("HMMA",)),
    _example(
        "tokens, window and cap",
        _Shape(_TOKENS, 8192, head_dim=256, kv_heads=16, scores=Scores(0.1, 4096, 50.0)),
        ("HMMA",),
    ),
    _example("tokens, fixed", _Shape(_TOKENS, 2048, fixed=True), ("HMMA",)),
    _example("tree of 8", _Shape((8,) * 8, 2048, tree=True)),
    _example("few queries", _Shape((8,) * 8, 2048), ("HMMA",)),
    _example("chunk of 16", _Shape((16,) * 8, 2048), ("HGMMA",)),
    _example("chunk of 16, window", _Shape((16,) * 8, 2048, scores=Scores(0.1, 1024)), ("HGMMA",)),
    _example("tree of 60", _Shape((60,) * 8, 2048, tree=True), ("HGMMA",)),
    _example("chunk", _Shape((512,), 4096), ("HGMMA",)),
    _example("prompt", _Shape((2048,), 2048), ("HGMMA",)),
    _example("prompt, head of 64", _Shape((2048,), 2048, **_SMALL), ("HGMMA",)),
    _example("prompt, head of 80", _Shape((2048,), 2048, **_PHI), ("HGMMA",)),
    _example("prompt, window", _Shape((2048,), 2048, scores=Scores(0.1, 1024)), ("HGMMA",)),
    _example(
        "prompt, window and cap",
        _Shape((2048,), 2048, head_dim=256, kv_heads=16, scores=Scores(0.1, 1024, 50.0)),
        ("HGMMA",),
    ),
    _example("prompt, float8", _Shape((2048,), 2048, held=torch.float8_e4m3fn), ("HGMMA",)),
    _example("prompt, int8", _Shape((2048,), 2048, held=torch.int8), ("HGMMA",)),
    _example(
        "prompt, blocks of 128, descriptors",
        _Shape((2048,), 2048, block=128, tile=_DESCRIPTORS),
        ("HGMMA", "UTMALDG"),
        90,
    ),
    _example("prompt, float32", _Shape((2048,), 2048, dtype=torch.float32)),
)
