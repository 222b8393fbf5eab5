"""Rotation, norms and the writing of keys and values against float64 and the CPU's encoding."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from infopt.core.layers.rotary import Rotary, inverse_frequencies
from infopt.kernels.attention.eight_bits import KvScales
from infopt.kernels.gpu import rope_cache as module
from infopt.kernels.gpu.cache import decoded, layout_of, new_cache
from infopt.kernels.gpu.rope_cache import HeadWeights, Turn, reference, reference_rows
from infopt.kernels.gpu.tile import Card

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-6, F16: 2e-3, BF16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    tokens: int = 5
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    dim: int | None = None
    """Numbers that are rotated; a head's where it is None, none where it is 0."""
    dtype: torch.dtype = F32
    held: torch.dtype | None = None
    norm: bool = False
    calibrated: bool = False
    block_size: int = 4


CASES = {
    "plain": Case(),
    "one token, one head": Case(tokens=1, heads=1, kv_heads=1),
    "nine heads of 64": Case(heads=9, kv_heads=3, head_dim=64, dtype=BF16),
    "heads of 80": Case(heads=4, kv_heads=4, head_dim=80, dtype=F16),
    "heads of 128, blocks of one token": Case(head_dim=128, dtype=BF16, block_size=1),
    "part of a head": Case(dim=8, head_dim=24),
    "no rotation": Case(dim=0),
    "norms": Case(norm=True, heads=7, kv_heads=1),
    "norms, no rotation": Case(norm=True, dim=0, dtype=BF16),
    "norms, part of a head": Case(norm=True, dim=6, head_dim=10),
    "int8": Case(held=INT8, dtype=BF16, head_dim=64),
    "int8, heads of 18, one head": Case(held=INT8, kv_heads=1, head_dim=18),
    "float8": Case(held=FP8, dtype=BF16, head_dim=80, kv_heads=3, heads=3),
    "float8, no rotation": Case(held=FP8, dim=0),
    "int8, calibrated": Case(held=INT8, calibrated=True),
    "float8, calibrated": Case(held=FP8, calibrated=True, norm=True, dtype=F16),
}


def check(case: Case, device: torch.device, card: Card, kernels: ModuleType = module) -> None:
    torch.manual_seed(0)
    every = case.heads + 2 * case.kv_heads
    qkv = torch.randn(case.tokens, every, case.head_dim).to(case.dtype).to(device)
    qkv[0, -1] = 0  # a row whose scale may be any
    turn = norm = scales = None
    dim = case.head_dim if case.dim is None else case.dim
    if dim:
        positions = torch.randint(0, 3000, (case.tokens,))
        angles = Rotary.at(positions, inverse_frequencies(dim, 10000.0), F32)
        turn = Turn(angles.cos.to(device), angles.sin.to(device))
    if case.norm:
        weight = torch.randn(case.heads + case.kv_heads, case.head_dim).to(case.dtype)
        norm = HeadWeights(weight.to(device), 1e-5)
    held = case.held or case.dtype
    # A block before the cache, into which a slot of -1 would lead.
    memory = new_cache(9, case.block_size, case.kv_heads, case.head_dim, held, device)
    memory.fill_(torch.nan if case.held is None else 113)
    cache = memory[1:]
    if case.calibrated:
        values = torch.rand(2 * case.kv_heads, 1, device=device) / 40 + 1e-3
        scales = KvScales(cache.dtype, values)
    slots = torch.randperm(8 * case.block_size)[: case.tokens].to(device)
    if case.tokens > 1:
        slots[1] = -1
    queries, key_value = reference(qkv, case.kv_heads, turn, norm)
    keys_before, before = qkv[:, case.heads :].clone(), memory.clone()
    kernels.rope_and_write(card, qkv, case.kv_heads, cache, slots, turn, norm, scales)
    close = {"atol": TOLERANCE[case.dtype], "rtol": TOLERANCE[case.dtype]}
    torch.testing.assert_close(qkv[:, : case.heads].double(), queries, **close)
    assert torch.equal(qkv[:, case.heads :], keys_before)
    kept = slots[slots >= 0]
    found = decoded(cache, case.kv_heads, case.head_dim)[kept]
    wanted = key_value[slots >= 0]
    if case.held is None:
        torch.testing.assert_close(found, wanted, **close)
    else:
        # In float32, but for what the order of operations does to the last bit.
        wanted = reference_rows(wanted.float(), cache, scales)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
    tokens = memory.view(len(memory) * case.block_size, -1)
    bits = tokens.view(torch.uint8) == before.view(tokens.shape).view(torch.uint8)
    bits[kept + case.block_size] = True
    assert bits.all(), "slots of other tokens were written"


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str, device: torch.device, card: Card) -> None:
    check(CASES[name], device, card)


MUTATIONS = {
    "the partner": ("d + DIM // 2, d - DIM // 2", "d + DIM // 2, d", "plain"),
    "who is rotated": ("turning = head < HEADS + KV_HEADS", "turning = head < HEADS", "plain"),
    "a partner's norm": ("partner *= inverse[:, None] * gain", "partner *= gain", "norms"),
    "tokens that are none": ("(row >= 0) & (row * 0 + slot >= 0)", "row >= 0", "plain"),
    "ties": ("bits + 0x7FFFF + ((bits >> 20) & 1)", "bits", "float8"),
    "small codes": ("tl.abs(x) < 0.015625", "tl.abs(x) < 0", "float8"),
    "where scales lie": ("slot * scale_stride + row", "slot * scale_stride + 0 * row", "int8"),
    "the largest code": ("tl.max(tl.abs(x), 1) / LARGEST", "tl.max(x, 1) / LARGEST", "int8"),
}
"""Text of the kernel, another in its place, and the case that finds it."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_kernel_that_is_wrong_is_found(
    name: str,
    device: torch.device,
    card: Card,
    mutated: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    text, other, case = MUTATIONS[name]
    with pytest.raises(AssertionError):
        check(CASES[case], device, card, mutated(module, text, other))


@pytest.mark.parametrize("held", [INT8, FP8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_leaves_a_row_without_a_finite_value(
    held: torch.dtype, bad: float, device: torch.device, card: Card
) -> None:
    qkv = torch.ones(1, 3, 8, device=device)
    qkv[0, 1, 3] = bad
    cache = new_cache(1, 2, 1, 8, held, device).zero_()
    slots = torch.tensor([1], device=device)
    module.rope_and_write(card, qkv, 1, cache, slots)
    key, value = decoded(cache, 1, 8)[1]
    assert not key.isfinite().any()
    torch.testing.assert_close(value, torch.ones_like(value))


@pytest.mark.parametrize("held", [BF16, INT8, FP8])
def test_a_layout_names_every_byte_once(held: torch.dtype, device: torch.device) -> None:
    cache = new_cache(3, 4, 3, 18, held, device).zero_()
    layout = layout_of(cache, 3, 18)
    assert layout.block_size == 4 and layout.value_offset == 3 * 18
    if layout.scales is None:
        assert cache.shape == (3, 4, 2, 3, 18) and layout.token_stride == 2 * 3 * 18
        return
    flat = cache.view(12, layout.token_stride)
    flat[:, : 2 * 3 * 18] = 1
    assert layout.token_stride % 16 == 0
    scales = [layout.scales[t * layout.scale_stride :][:6] for t in range(12)]
    assert all((one == 0).all() for one in scales), "scales lie among the codes"
    scales[11].fill_(1.0)
    assert (flat[:, : 2 * 3 * 18] == 1).all()
