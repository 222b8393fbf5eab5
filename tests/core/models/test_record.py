"""Recorded steps against the same decoder's ordinary ones, for every kind of model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.layers.choice import NativeChoice
from infopt.core.layers.fuse import SideBySide
from infopt.core.layers.linear import Linear
from infopt.core.layers.native import NativeGroups, NativeInt8
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.models.load import load_decoder
from infopt.core.models.mlp import GatedMLP
from infopt.core.models.record import Recorded, Rows, Size, Unrecordable, record
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention
from infopt.kernels.cpu.groups import pack_groups
from infopt.kernels.cpu.int8 import Grid, pack_int8
from infopt.kernels.cpu.native import Native, NativeError, load
from infopt.kernels.cpu.program import Program

CPU = torch.device("cpu")
SIZE, BLOCKS = 4, 12
LENGTHS = (37, 12, 1, 25)
KINDS = (
    "llama", "llama-biased-tied", "llama3-scaling", "yarn-scaling", "dynamic-scaling", "mistral",
    "mistral-window", "qwen2", "qwen2-window", "qwen3", "phi3", "phi3-longrope", "gemma2",
    "gemma3", "opt", "opt-norms-after", "gpt2",
)  # fmt: skip
EXPERTS = ("mixtral", "qwen3-moe", "qwen3-moe-normalized")
Tiny = Callable[[str], tuple[Artifact, Any]]


@pytest.fixture(scope="module")
def native() -> Native:
    try:
        return load()
    except NativeError as error:
        pytest.skip(str(error))


def caches_of(decoder: Decoder, kept: torch.dtype) -> list[Tensor]:
    config = decoder.config
    shape = (BLOCKS * len(LENGTHS), SIZE, config.kv_heads, config.head_dim)
    return [new_cache(*shape, kept, CPU) for _ in range(config.layers)]


def inputs_of(prompts: list[Tensor], spans: list[tuple[int, int, int]]) -> StepInputs:
    """(prompt, start, end), those of a single token first."""
    tables = [list(range(BLOCKS * p, BLOCKS * (p + 1))) for p, _, _ in spans]
    starts = [0]
    for _, start, end in spans:
        starts.append(starts[-1] + end - start)
    return StepInputs(
        torch.cat([prompts[p][start:end] for p, start, end in spans]),
        torch.cat([torch.arange(start, end) for _, start, end in spans]),
        torch.cat([torch.arange(start, end) + BLOCKS * SIZE * p for p, start, end in spans]),
        plan_attention(tables, [e for _, _, e in spans], starts, SIZE, prompts[0].dtype, CPU),
    )


def prefilled(decoder: Decoder, prompts: list[Tensor], kept: torch.dtype) -> list[Tensor]:
    """Caches that hold all but the last token of each prompt; NaN where nothing is."""
    caches = caches_of(decoder, kept)
    for cache in caches:
        cache.view(torch.uint8).fill_(0xFF)
    spans = [(p, 0, n - 1) for p, n in enumerate(LENGTHS) if n > 1]
    inputs = inputs_of(prompts, spans)
    plan = plan_attention(
        inputs.plan.tables, [n - 1 for n in LENGTHS if n > 1],
        [0, 36, 47, 71], SIZE, decoder.dtype, CPU,
    )  # fmt: skip
    decoder(replace(inputs, plan=plan), caches)
    return caches


def last_tokens(decoder: Decoder, prompts: list[Tensor]) -> StepInputs:
    spans = [(p, n - 1, n) for p, n in enumerate(LENGTHS)]
    found = inputs_of(prompts, spans)
    plan = plan_attention(
        found.plan.tables, list(LENGTHS), [0, 1, 2, 3, 4], SIZE, decoder.dtype, CPU
    )
    return replace(found, plan=plan)


def recorded(
    native: Native, decoder: Decoder, caches: list[Tensor], capacity: int = 6
) -> tuple[Program, Rows, Recorded]:
    size = Size(rows=capacity, wanted=capacity, alone=capacity, width=BLOCKS)
    program, rows = Program(native, capacity, 1), Rows.empty(size)
    result = record(decoder, program, size, rows, caches)
    for buffer in (result.hidden, result.logits):
        buffer.fill_(torch.nan)
    return program, rows, result


def replay(program: Program, rows: Rows, result: Recorded, inputs: StepInputs) -> None:
    program.rows = count = len(inputs.token_ids)
    rows.token_ids[:count] = inputs.token_ids
    rows.positions[:count] = inputs.positions
    rows.slots[:count] = inputs.slots
    rows.wanted[:count] = torch.arange(count)
    result.wanted.set(count)
    rows.tables[:count] = torch.tensor([list(table) for table in inputs.plan.tables])
    program.run()


def prompts_of() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(97, (n,)) for n in LENGTHS]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("packs", [False, True], ids=["torch's weights", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_a_recorded_step_is_the_ordinary_one(
    kind: str, packs: bool, tiny: Tiny, native: Native
) -> None:
    packing = NativeChoice(native, torch.float32, None) if packs else None
    decoder = load_decoder(tiny(kind)[0], torch.float32, CPU, native=packing)
    prompts = prompts_of()
    with torch.inference_mode(False):
        caches = prefilled(decoder, prompts, torch.float32)
        program, rows, result = recorded(native, decoder, caches)
    inputs = last_tokens(decoder, prompts)
    ordinary = [cache.clone() for cache in caches]
    hidden = decoder(inputs, ordinary)
    wanted = decoder.logits(hidden.clone())
    for _ in range(2):  # the second time as the first
        replay(program, rows, result, inputs)
        assert float((result.logits[:4] - wanted).abs().max()) < 1e-4
        assert float((result.hidden[:4] - hidden).abs().max()) < 1e-4
    assert result.logits[4:].isnan().all() and result.hidden[4:].isnan().all()
    for ours, theirs in zip(caches, ordinary, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@torch.inference_mode()
@pytest.mark.parametrize("packs", [False, True], ids=["torch's weights", "packed"])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2", "mistral-window"])
def test_in_bfloat16_it_is_no_farther_from_the_truth(
    kind: str, kept: torch.dtype, packs: bool, tiny: Tiny, native: Native
) -> None:
    artifact, prompts = tiny(kind)[0], prompts_of()
    packing = NativeChoice(native, torch.bfloat16, None) if packs else None
    decoder = load_decoder(artifact, torch.bfloat16, CPU, native=packing)
    with torch.inference_mode(False):
        caches = prefilled(decoder, prompts, kept)
        program, rows, result = recorded(native, decoder, caches)
    replay(program, rows, result, last_tokens(decoder, prompts))
    ordinary = prefilled(decoder, prompts, kept)
    theirs = decoder.logits(decoder(last_tokens(decoder, prompts), ordinary))

    exact = load_decoder(artifact, torch.float32, CPU)
    truth = exact.logits(
        exact(last_tokens(exact, prompts), prefilled(exact, prompts, torch.float32))
    )
    assert distance(result.logits[:4], truth) < 1.3 * distance(theirs, truth) + 2e-3
    assert distance(result.logits[:4], theirs) < 3e-2


def in_groups(native: Native, size: tuple[int, int], zeros: bool, order: bool) -> NativeGroups:
    """A projection of 4 bits, in groups of 32 inputs."""
    outputs, inputs = size
    codes = torch.randint(16, size, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // 32) / (4 * inputs**0.5)
    middle = torch.randint(6, 10, scales.shape, dtype=torch.uint8) if zeros else 8
    columns = torch.randperm(inputs, dtype=torch.int32) if order else None
    bias = torch.randn(outputs) / 4 if order else None
    return NativeGroups(native, pack_groups(codes, scales, middle, 4), bias, columns)


def in_int8(native: Native, size: tuple[int, int], fixed: bool) -> NativeInt8:
    codes = torch.randint(-128, 128, size, dtype=torch.int8)
    scales = torch.rand(size[0]) / (64 * size[1] ** 0.5)
    grid = Grid(127.0, 128, torch.tensor([0.05]) if fixed else None)
    return NativeInt8(native, pack_int8(codes, scales), grid)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_integers(dtype: torch.dtype, tiny: Tiny, native: Native) -> None:
    """Of every form in one decoder, some side by side."""
    decoder, prompts = load_decoder(tiny("llama")[0], dtype, CPU), prompts_of()
    first, second = decoder.layers
    gates = in_groups(native, (96, 64), True, False), in_int8(native, (96, 64), False)
    assert isinstance(first.mlp, GatedMLP) and isinstance(second.mlp, GatedMLP)
    first = replace(
        first,
        attention=replace(first.attention, qkv=in_groups(native, (128, 64), False, True)),
        mlp=replace(first.mlp, gate_up=SideBySide(gates)),
    )
    second = replace(
        second,
        attention=replace(second.attention, output=in_int8(native, (64, 64), True)),
        mlp=replace(second.mlp, down=in_groups(native, (64, 96), True, True)),
    )
    decoder = replace(decoder, layers=(first, second))
    with torch.inference_mode(False):
        caches = prefilled(decoder, prompts, dtype)
        program, rows, result = recorded(native, decoder, caches)
    inputs = last_tokens(decoder, prompts)
    wanted = decoder.logits(decoder(inputs, [cache.clone() for cache in caches]))
    replay(program, rows, result, inputs)
    if dtype == torch.float32:
        assert float((result.logits[:4] - wanted).abs().max()) < 1e-4
    else:
        assert distance(result.logits[:4], wanted) < 3e-2
    assert float(wanted.float().std()) > 0.01, "the layers say something"


@torch.inference_mode()
def test_no_row_depends_on_the_others(tiny: Tiny, native: Native) -> None:
    """To the last bit, in the logits and in the cache."""
    decoder, prompts = load_decoder(tiny("llama")[0], torch.float32, CPU), prompts_of()
    inputs = last_tokens(decoder, prompts)
    with torch.inference_mode(False):
        caches = prefilled(decoder, prompts, torch.float32)
        together = recorded(native, decoder, caches)
        apart = recorded(native, decoder, caches, capacity=1)
    replay(*together, inputs)
    held = caches[1].clone()
    for p, length in enumerate(LENGTHS):
        one = inputs_of(prompts, [(p, length - 1, length)])
        replay(*apart, one)
        assert torch.equal(apart[2].logits[0], together[2].logits[p])
    assert torch.equal(caches[1].nan_to_num(7.0), held.nan_to_num(7.0))


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_not_recorded(kind: str, tiny: Tiny, native: Native) -> None:
    decoder = load_decoder(tiny(kind)[0], torch.float32, CPU)
    with pytest.raises(Unrecordable, match="ExpertsMLP"):
        recorded(native, decoder, caches_of(decoder, torch.float32))


def test_what_has_no_native_op_is_not_recorded(tiny: Tiny, native: Native) -> None:
    artifact = tiny("llama")[0]
    decoder = load_decoder(artifact, torch.float32, CPU)
    with pytest.raises(Unrecordable, match="cache"):
        recorded(native, decoder, caches_of(decoder, torch.float8_e4m3fn))
    fixed = load_decoder(artifact, torch.float32, CPU, deterministic=True)
    with pytest.raises(Unrecordable, match=r"lm_head|deterministic"):
        recorded(native, fixed, caches_of(fixed, torch.float32))
    half = replace(decoder, head=Linear(torch.zeros(97, 64, dtype=torch.float16)))
    with pytest.raises(Unrecordable, match="lm_head"):
        recorded(native, half, caches_of(decoder, torch.float32))
