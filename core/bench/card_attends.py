"""Attention over a paged cache as `infopt bench kernels` times it on a GPU, beside torch's SDPA.

Torch reads keys and values that lie side by side, which no paged cache has: what gathering them
would take is not in its times. Importing this imports Triton.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infopt.core.bench.card_made import BF16, F8, UNIT, Made, Work, near
from infopt.kernels.attention.scores import Scores
from infopt.kernels.gpu.cache import decoded, fill_with_noise, new_cache
from infopt.kernels.gpu.paged_attention import (
    Launch,
    Part,
    Tree,
    paged_attention,
    reference,
)
from infopt.kernels.gpu.plan import plan_part
from infopt.kernels.gpu.tile import Card
from infopt.kernels.gpu.tree import plan_tree

_BLOCK = 16
_CHECKED = 32
"""Queries at each end of a prompt that are held to the reference, whose scores of a whole prompt
would take gigabytes."""
_MOST_REQUESTS = 4
"""And of other requests so many."""
_CUDA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True, slots=True)
class Attends:
    """Requests of one launch; shapes of Llama-3-8B where nothing else is said."""

    name: str
    lengths: tuple[int, ...]
    """New tokens of each request."""
    contexts: tuple[int, ...]
    """Tokens of each, the new ones among them."""
    bound: str
    """By reading or by multiplying: what its figure of merit is a share of."""
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    held: torch.dtype = BF16
    tree: bool = False
    tolerance: float = UNIT

    @property
    def whole_prompts(self) -> bool:
        return not self.tree and self.lengths == self.contexts

    @property
    def pairs(self) -> int:
        """Of queries and the keys that they see; of trees all keys of the request."""
        each = zip(self.lengths, self.contexts, strict=True)
        if self.tree:
            return sum(new * context for new, context in each)
        return sum(new * (context - new) + new * (new + 1) // 2 for new, context in each)

    def make(self, card: Card, device: torch.device) -> Made:
        held = _Held.at_random(self, device)
        launch = Launch(
            max(self.lengths), self.heads // self.kv_heads, self.head_dim, self.held,
            tree=self.tree,
        )  # fmt: skip
        tile = launch.tile(card)
        part = plan_part(
            card, tile, held.tables, self.contexts, self.lengths, heads=self.heads,
            kv_heads=self.kv_heads, device=device,
        )  # fmt: skip

        def ours() -> object:
            paged_attention(
                card, held.query, held.cache, self.kv_heads, part, held.scores, tile, held.out,
                held.tree,
            )  # fmt: skip
            return held.out

        def error() -> float:
            held.out.fill_(torch.nan)
            ours()
            return _error(self, held, part)

        kept = held.cache[0, 0].numel() * held.cache.element_size()
        return Made(
            ours, _ways(self, held, device), error,
            nbytes=sum(self.contexts) * kept + 2 * held.query.nbytes,
            flops=4.0 * self.pairs * self.heads * self.head_dim,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Held:
    query: Tensor
    out: Tensor
    cache: Tensor
    tables: Sequence[Sequence[int]]
    scores: Scores
    tree: Tree | None

    @classmethod
    def at_random(cls, case: Attends, device: torch.device) -> "_Held":
        """Blocks in no order, as they lie after a while."""
        widths = [-(-context // _BLOCK) for context in case.contexts]
        order = torch.randperm(sum(widths)).tolist()
        tables = [[order.pop() for _ in range(width)] for width in widths]
        shape = (sum(widths), _BLOCK, case.kv_heads, case.head_dim, case.held)
        cache = new_cache(*shape, device)
        fill_with_noise(cache, case.kv_heads, case.head_dim)
        tokens = sum(case.lengths)
        query = torch.randn(tokens, case.heads, case.head_dim, device=device).to(BF16)
        scores = Scores(case.head_dim**-0.5 / (8 if case.held != BF16 else 1))
        tree = _random_tree(case, device) if case.tree else None
        return cls(query, torch.empty_like(query), cache, tables, scores, tree)


def _random_tree(case: Attends, device: torch.device) -> Tree:
    """Each node's parent is one of those before it, the first's the end of the context."""
    parents = [
        [int(torch.randint(node, ())) if node else -1 for node in range(new)]
        for new in case.lengths
    ]
    return plan_tree(parents, case.contexts, device)


def _error(case: Attends, held: _Held, part: Part) -> float:
    """Of some requests' rows, or of the ends of a long prompt, which are shorter contexts of it."""
    starts = part.starts.tolist()
    worst = 0.0
    for request in range(len(case.lengths))[:_MOST_REQUESTS]:
        new, context = case.lengths[request], case.contexts[request]
        ends = [(0, new)]
        if case.whole_prompts and new > 2 * _CHECKED:
            ends = [(0, _CHECKED), (new // 2, new // 2 + _CHECKED), (new - _CHECKED, new)]
        for first, last in ends:
            rows = slice(starts[request] + first, starts[request] + last)
            there = torch.tensor([0, last - first], dtype=torch.int32)
            one = Part(
                tiles=there, starts=there, contexts=torch.tensor([context - new + last]),
                tables=part.tables[request : request + 1],
            )  # fmt: skip
            tree = held.tree and Tree(held.tree.seen[rows], held.tree.positions[rows])
            wanted = reference(held.query[rows], held.cache, case.kv_heads, one, held.scores, tree)
            worst = max(worst, near(held.out[rows], wanted))
    return worst


def _ways(case: Attends, held: _Held, device: torch.device) -> Mapping[str, Work]:
    """SDPA with each of its backends, over keys and values in bfloat16 that lie side by side."""
    backends = _CUDA if device.type == "cuda" else {"math": SDPBackend.MATH}
    if len(set(case.contexts)) > 1 or len(set(case.lengths)) > 1:
        alone = [_Alone.of(case, held, n) for n in range(len(case.lengths))]
    else:
        alone = [_Alone.of(case, held, None)]
    found: dict[str, Work] = {}
    for name, backend in backends.items():
        found[f"SDPA, {name}"] = partial(_each, alone, backend)
        if case.whole_prompts and name == "efficient":  # has no grouped queries
            found[f"SDPA, {name}"] = partial(_each, [one.repeated() for one in alone], backend)
    return found


@dataclass(frozen=True, slots=True)
class _Alone:
    """Inputs of one call of SDPA."""

    query: Tensor
    """[R, heads, new, head_dim]; but for whole prompts [R, kv_heads, group * new, head_dim]."""
    key: Tensor
    value: Tensor
    """[R, kv_heads, context, head_dim]"""
    mask: Tensor | None
    scale: float
    causal: bool

    @classmethod
    def of(cls, case: Attends, held: _Held, request: int | None) -> "_Alone":
        """One request, or all of them, which are alike in size."""
        some = range(len(case.lengths)) if request is None else [request]
        new, context = case.lengths[some[0]], case.contexts[some[0]]
        start = sum(case.lengths[: some[0]])
        rows = slice(start, start + new * len(some))
        blocks = torch.tensor([held.tables[n] for n in some], device=held.cache.device)
        kept = decoded(held.cache, case.kv_heads, case.head_dim) if case.held != BF16 else None
        slots = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=blocks.device)).flatten(
            1
        )
        flat = held.cache.view(-1, 2 * case.kv_heads, case.head_dim) if kept is None else kept
        both = flat[slots[:, :context]].to(BF16).transpose(1, 2)
        key, value = (x.contiguous() for x in both.chunk(2, dim=1))
        query = held.query[rows].view(len(some), new, case.heads, case.head_dim).transpose(1, 2)
        mask = None
        if not case.whole_prompts:
            group = case.heads // case.kv_heads
            query = query.reshape(len(some), case.kv_heads, group * new, case.head_dim)
            if held.tree is not None:
                mask = _mask(held.tree.seen[rows, :new], len(some), context, group)
        return cls(query.contiguous(), key, value, mask, held.scores.scale, case.whole_prompts)

    def repeated(self) -> "_Alone":
        """A key head for every head; the copy is not timed."""
        group = self.query.shape[1] // self.key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (self.key, self.value))
        return replace(self, key=key, value=value)


def _mask(seen: Tensor, requests: int, context: int, group: int) -> Tensor:
    """[R, 1, group * new, context]: of keys before the tree all."""
    new = seen.shape[1]
    own = seen.view(requests, 1, new, new).bool()
    before = own.new_ones(requests, 1, new, context - new)
    return torch.cat((before, own), -1).repeat(1, 1, group, 1)


def _each(alone: Sequence[_Alone], backend: SDPBackend) -> list[Tensor]:
    with sdpa_kernel(backend):
        return [_attend(one) for one in alone]


def _attend(one: _Alone) -> Tensor:
    return F.scaled_dot_product_attention(
        one.query, one.key, one.value, one.mask, is_causal=one.causal, scale=one.scale,
        enable_gqa=one.query.shape[1] > one.key.shape[1],
    )  # fmt: skip


def _prompts(name: str, *lengths: int, held: torch.dtype = BF16) -> Attends:
    return Attends(name, lengths, lengths, "product", held=held)


def _alike(
    name: str, number: int, new: int, context: int, *, held: torch.dtype = BF16, tree: bool = False
) -> Attends:
    return Attends(name, (new,) * number, (context,) * number, "reading", held=held, tree=tree)


ATTENDS = (
    _prompts("prompt", 8192),
    _prompts("prompt", 16384),
    _prompts("prompts, ragged", 8192, 1024, 4096, 512, 2048),
    _prompts("prompt, int8 cache", 8192, held=torch.int8),
    _prompts("prompt, float8 cache", 8192, held=F8),
    _alike("tokens", 32, 1, 2048),
    _alike("tokens", 128, 1, 4096),
    Attends("tokens, ragged", (1,) * 32, tuple(range(512, 16385, 512)), "reading"),
    _alike("one token", 1, 1, 65536),
    _alike("tokens, int8 cache", 64, 1, 4096, held=torch.int8),
    _alike("tokens, float8 cache", 64, 1, 4096, held=F8),
    _alike("trees of 16", 32, 16, 4096, tree=True),
    _alike("trees of 64", 16, 64, 4096, tree=True),
)
"""Those bound by reading have 256 MiB of keys and values or more: 4 KiB a token in 16 bits."""
