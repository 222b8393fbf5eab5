"""Batch invariance, bit by bit: a token's logits, whatever else is in its step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.models.load import load_decoder
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention

CPU = torch.device("cpu")
SIZE, BLOCKS = 4, 20
LENGTHS = (37, 12, 1, 25)
Tiny = Callable[[str], tuple[Artifact, Any]]
Step = list[tuple[int, int, int]]
"""(prompt, start, end), those of a single token first."""


@torch.inference_mode()
def run(
    decoder: Decoder, prompts: list[Tensor], steps: list[Step], kept: torch.dtype | None = None
) -> dict[int, Tensor]:
    """The logits of all tokens that the steps compute, by prompt and in their order."""
    config = decoder.config
    caches = [
        new_cache(
            BLOCKS * len(prompts),
            SIZE,
            config.kv_heads,
            config.head_dim,
            kept or decoder.dtype,
            CPU,
        )
        for _ in range(config.layers)
    ]
    tables = [list(range(BLOCKS * p, BLOCKS * (p + 1))) for p in range(len(prompts))]
    found: dict[int, list[Tensor]] = {}
    for parts in steps:
        ids = torch.cat([prompts[p][start:end] for p, start, end in parts])
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        slots = torch.cat([torch.arange(start, end) + BLOCKS * SIZE * p for p, start, end in parts])
        starts = [0]
        for _, start, end in parts:
            starts.append(starts[-1] + end - start)
        plan = plan_attention(
            [tables[p] for p, _, _ in parts],
            [end for _, _, end in parts],
            starts,
            SIZE,
            decoder.dtype,
            CPU,
        )
        logits = decoder.logits(decoder(StepInputs(ids, positions, slots, plan), caches))
        for (p, _, _), own in zip(parts, logits.split([e - s for _, s, e in parts]), strict=True):
            found.setdefault(p, []).append(own)
    return {p: torch.cat(own) for p, own in found.items()}


def alone(decoder: Decoder, prompts: list[Tensor], **kwargs: Any) -> dict[int, Tensor]:
    """Each prompt by itself, in one step."""
    found: dict[int, Tensor] = {}
    for p, prompt in enumerate(prompts):
        found |= run(decoder, prompts, [[(p, 0, len(prompt))]], **kwargs)
    return found


def token_by_token(length: int) -> list[Step]:
    return [[(0, n, n + 1)] for n in range(length)]


TOGETHER: list[Step] = [[(2, 0, 1), (0, 0, 37), (1, 0, 12), (3, 0, 25)]]
INTERLEAVED: list[Step] = [
    [(2, 0, 1), (0, 0, 5)],
    [(1, 0, 11), (0, 5, 20)],
    [(1, 11, 12), (3, 0, 17), (0, 20, 22)],
    [(3, 17, 18), (0, 22, 37)],
    [(3, 18, 25)],
]
EXACT = ["llama", "qwen2-window", "phi3", "gemma2", "gemma3", "opt", "gpt2", "mixtral", "qwen3-moe"]


def same(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> bool:
    return all(torch.equal(ours[p], theirs[p]) for p in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EXACT)
def test_no_bit_depends_on_the_batch(kind: str, dtype: torch.dtype, tiny: Tiny) -> None:
    decoder = load_decoder(tiny(kind)[0], dtype, CPU, deterministic=True)
    torch.manual_seed(1)
    prompts = [torch.randint(97, (n,)) for n in LENGTHS]
    wanted = alone(decoder, prompts)
    assert same(run(decoder, prompts, TOGETHER), wanted)
    assert same(run(decoder, prompts, INTERLEAVED), wanted)
    assert same(run(decoder, prompts, token_by_token(37)), wanted)
    # The least of it: deterministic logits are the others, up to rounding.
    plain = alone(load_decoder(tiny(kind)[0], dtype, CPU), prompts)
    near = 1e-5 if dtype == torch.float32 else 0.1
    for p, logits in plain.items():
        assert float((logits - wanted[p]).norm() / logits.norm()) < near


@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_nor_with_keys_and_values_in_8_bits(kept: torch.dtype, tiny: Tiny) -> None:
    decoder = load_decoder(tiny("llama")[0], torch.bfloat16, CPU, deterministic=True)
    prompts = [torch.randint(97, (n,)) for n in LENGTHS]
    wanted = alone(decoder, prompts, kept=kept)
    for steps in (TOGETHER, INTERLEAVED, token_by_token(37)):
        assert same(run(decoder, prompts, steps, kept), wanted)


def test_the_usual_mode_has_bits_that_do(tiny: Tiny) -> None:
    """Else the tests above would show nothing."""
    decoder = load_decoder(tiny("llama")[0], torch.float32, CPU)
    prompts = [torch.randint(97, (n,)) for n in LENGTHS]
    wanted = alone(decoder, prompts)
    assert not same(run(decoder, prompts, token_by_token(37)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nor_in_the_default_model(default_artifact: Artifact, dtype: torch.dtype) -> None:
    decoder = load_decoder(default_artifact, dtype, CPU, deterministic=True)
    torch.manual_seed(1)
    prompts = [torch.randint(1000, (n,)) for n in LENGTHS]
    wanted = alone(decoder, prompts)
    for steps in (TOGETHER, INTERLEAVED, token_by_token(20)):
        found = run(decoder, prompts, steps)
        assert same(found, {p: wanted[p][: len(found[p])] for p in found})


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("llama", "embedding", "model.embed_tokens"),
        ("llama", "mlp", "model.layers.1.mlp"),
        ("gpt2", "attention", "transformer.h.1.attn"),
        ("opt", "mlp", "model.decoder.layers.1.fc2"),
        ("llama", "norm", "model.norm"),
        ("llama", "head", "lm_head"),
    ],
)
def test_the_first_fault_is_named(kind: str, part: str, named: str, tiny: Tiny) -> None:
    decoder = load_decoder(tiny(kind)[0], torch.float32, CPU)
    layer = decoder.layers[1]
    broken: Any = {
        "embedding": decoder.embedding,
        "mlp": layer.mlp.down,  # type: ignore[attr-defined]
        "attention": layer.attention.output,
        "norm": decoder.norm,
        "head": decoder.head,
    }[part]
    broken.weight[3] = torch.nan
    tokens = torch.tensor([3, 5, 3])
    places = torch.arange(3)
    plan = plan_attention([[0]], [3], [0, 3], SIZE, torch.float32, CPU)
    inputs = StepInputs(tokens, places, places, plan)
    caches = [
        new_cache(1, SIZE, decoder.config.kv_heads, decoder.config.head_dim, torch.float32, CPU)
        for _ in decoder.layers
    ]
    hidden = decoder(inputs, caches)
    assert not bool(torch.isfinite(decoder.logits(hidden)[2]).all())
    before = [cache.clone() for cache in caches]
    assert decoder.first_fault(inputs, caches, 2) == named
    for one, other in zip(before, caches, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), "written as before"


def test_fixed_reads_are_planned_once(tiny: Tiny) -> None:
    plan = plan_attention([[0, 1, 2, 3, 4, 5]], [21], [0, 21], SIZE, torch.float32, CPU)
    tiles = plan.reads(None, fixed=True).tiles
    assert [tile.rows for tile in tiles] == [slice(0, 16), slice(16, 21)]
    assert [len(tile.slots) for tile in tiles] == [16, 32]
    assert plan.reads(None, fixed=True).tiles is tiles
