"""What a GPU's kernels make of a layer's attention, beside torch: steps of tokens and chunks."""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from infopt.core.layers.attention import Attention, AttentionInputs
from infopt.core.layers.linear import Linear
from infopt.core.layers.norm import HeadNorm
from infopt.core.layers.rotary import Rotary, inverse_frequencies
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.eight_bits import STORAGE, KvScales
from infopt.kernels.attention.paged import plan_attention
from infopt.kernels.gpu import cache as card_cache
from infopt.kernels.gpu.tile import H100, Card

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    window: int | None = None
    cap: float | None = None
    norm: bool = False
    rotary: int | None = 0
    dim: int = 16
    fixed: bool = False
    held: torch.dtype = torch.float32
    calibrated: bool = False


CASES = {
    "plain": Case(),
    "window and cap": Case(window=9, cap=3.0),
    "norms of heads": Case(norm=True),
    "learned positions": Case(rotary=None),
    "part of a head is rotated": Case(dim=8),
    "fixed": Case(fixed=True),
    "int8": Case(held=torch.int8),
    "float8, calibrated": Case(held=torch.float8_e4m3fn, calibrated=True),
}
REQUESTS = [(1, 1), (1, 20), (6, 6), (9, 30)]
"""New tokens, context."""


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_attend_as_torch_does(name: str) -> None:
    from infopt.core.layers.card_attention import CardInputs, StepPlan

    torch.manual_seed(0)
    case, heads, kv_heads, head_dim, size = CASES[name], 4, 2, 16, 4
    scales = None
    if case.calibrated:
        scales = KvScales(STORAGE[case.held], torch.rand(2 * kv_heads, 1) / 40 + 0.01)
    unused = Linear(torch.zeros(1, 1))
    layer = Attention(
        qkv=unused,
        output=unused,
        head_norm=HeadNorm(torch.randn(heads + kv_heads, head_dim), 1e-5) if case.norm else None,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=0.25,
        rotary=case.rotary,
        window=case.window,
        cap=case.cap,
        kv_scales=scales,
        fixed=case.fixed,
    )
    widths = [-(-context // size) for _, context in REQUESTS]
    order = torch.randperm(sum(widths)).tolist()
    tables = [[order.pop() for _ in range(width)] for width in widths]
    blocks = sum(widths)
    plain = new_cache(blocks, size, kv_heads, head_dim, case.held, CPU)
    ours = card_cache.new_cache(blocks, size, kv_heads, head_dim, case.held, CPU)
    card = Card.with_shipped(**H100)
    # Everything that comes before, then the step itself.
    for past in (True, False):
        spans = [
            (0, context - new) if past else (context - new, context) for new, context in REQUESTS
        ]
        kept = [(t, span) for t, span in zip(tables, spans, strict=True) if span[1] > span[0]]
        kept.sort(key=lambda one: one[1][1] - one[1][0] > 1)
        positions = torch.cat([torch.arange(*span) for _, span in kept])
        slots = torch.tensor(
            [t[p // size] * size + p % size for t, span in kept for p in range(*span)]
        )
        starts = [0]
        for _, (first, last) in kept:
            starts.append(starts[-1] + last - first)
        plan = plan_attention(
            [t for t, _ in kept], [s[1] for _, s in kept], starts, size, torch.float32, CPU
        )
        frequencies = inverse_frequencies(case.dim, 10000.0)
        rotaries = (Rotary.at(positions, frequencies, torch.float32),)
        qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * head_dim)
        wanted = AttentionInputs(rotaries, slots, plan).attend(layer, qkv.clone(), plain)
        inputs = CardInputs(card, rotaries, slots, StepPlan(card, plan, CPU))
        found = inputs.attend(layer, qkv.clone(), ours)
    tolerance = 1e-5 if case.held == torch.float32 else 2e-4
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
