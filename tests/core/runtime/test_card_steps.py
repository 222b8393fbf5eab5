"""The engine on a GPU's kernels, without one: under the interpreter, graphs as work done again."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.models.load import load_decoder
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.batch import Span, step_inputs
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.step_program import Replays
from infopt.kernels.gpu.tile import H100, Card

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
CPU = torch.device("cpu")
CARD = Card.with_shipped(**H100)
PROMPTS = [[(7 * n + 11 * p) % 97 for n in range(3 + 7 * p)] for p in range(3)]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
MakeEngine = Callable[..., Engine]


def again(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """In place of a graph: the same work over the same memory, its result where it was."""
    result = work()

    def replay() -> None:
        result.copy_(work())

    return replay, result


def answers(engine: Engine, prompts: Sequence[list[int]]) -> dict[str, list[int]]:
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, GREEDY)
    found: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_batch_tokens": 5, "kv_blocks": 8, "block_size": 3},
        {"kv_dtype": "int8"},
        {"kv_dtype": "fp8", "block_size": 16},
        {"deterministic": True},
    ],
    ids=str,
)
def test_greedy_answers_are_those_of_torch(
    make_engine: MakeEngine, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks, prefixes that are shared and preemption, over either layout of the cache."""
    wanted = answers(make_engine(kernels="torch", **settings), PROMPTS)
    monkeypatch.setattr("infopt.core.runtime.loaded.find_card", lambda word, device: CARD)
    engine = make_engine(kernels="torch", **settings)
    assert engine._runner.decoder.card is CARD
    assert answers(engine, PROMPTS) == wanted
    assert answers(engine, PROMPTS[::-1]) == {
        str(2 - int(name)): tokens for name, tokens in wanted.items()
    }


def runners(artifact: Artifact, rows: int) -> tuple[ModelRunner, ModelRunner]:
    """One whose decode steps are replayed, and one of torch."""
    from infopt.core.runtime.card_steps import CardSteps

    ours = load_decoder(artifact, torch.float32, CPU, card=CARD)
    theirs = load_decoder(artifact, torch.float32, CPU)
    caches = [
        KVCache.of(one, blocks=40, block_size=4, dtype=torch.float32) for one in (ours, theirs)
    ]
    for cache in caches:
        for layer in cache.layers:
            layer.fill_(torch.nan)
    with torch.inference_mode():
        steps = CardSteps(ours, caches[0].layers, rows=rows, context=40, record=again)
    return ModelRunner(ours, caches[0], None, Replays(steps)), ModelRunner(theirs, caches[1])


@pytest.mark.interpreted
def test_replayed_steps_are_ordinary_ones(tiny_reference: tuple[Artifact, Any]) -> None:
    """Steps of one to five tokens, each in the bucket above it; chunks are not replayed."""
    torch.manual_seed(0)
    ours, theirs = runners(tiny_reference[0], 5)
    lengths = [3, 9, 1, 17, 6]
    tables = [list(range(8 * r, 8 * r + 8)) for r in range(5)]

    def both(spans: list[Span], rows: list[int] | None = None) -> None:
        inputs = step_inputs(spans, block_size=4, dtype=torch.float32, device=CPU)
        wanted = None if rows is None else torch.tensor(rows)
        found = [runner.run(inputs, wanted) for runner in (ours, theirs)]
        torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)

    def tokens(count: int) -> list[int]:
        return torch.randint(97, (count,)).tolist()

    both([Span(tokens(lengths[2]), 0, tables[2])])
    both([Span(tokens(n), 0, tables[r]) for r, n in enumerate(lengths) if n > 1])
    assert ours.replays.count == 1
    for step, count in enumerate((5, 1, 3, 4, 2)):
        chosen = torch.randperm(5)[:count].tolist()
        spans = [Span(tokens(1), lengths[r], tables[r]) for r in chosen]
        both(spans, [count - 1] if count == 3 else None)
        for r in chosen:
            lengths[r] += 1
        assert ours.replays.count == step + 2
    for one, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_buckets_hold_every_number_of_rows() -> None:
    from infopt.core.runtime.card_steps import buckets

    assert buckets(1) == (1,) and buckets(5) == (1, 2, 4, 5)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    large = buckets(300)
    assert large[-1] == 300 and 256 in large and list(large) == sorted(set(large))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_replays_what_torch_computes(
    tiny_reference: tuple[Artifact, Any], dtype: str
) -> None:
    """On a GPU: decode steps as CUDA graphs, and in float32 torch's greedy answers."""
    found = {}
    for kernels in ("torch", "native"):
        settings = EngineSettings(
            device="cuda", dtype=dtype, kernels=kernels, block_size=4, kv_blocks=64, max_running=4
        )
        engine = Engine.load(tiny_reference[0], settings)
        found[kernels] = answers(engine, PROMPTS)
        stats = engine.stats()
        if kernels == "native":
            assert stats.not_replayed is None and stats.replayed > 0
    if dtype == "float32":
        assert found["native"] == found["torch"]


@pytest.mark.gpu
def test_a_gpu_goes_a_step_ahead_and_answers_the_same(tiny_reference: tuple[Artifact, Any]) -> None:
    """Tokens gathered on the device, read from pinned memory behind an event; stops a step late."""
    found = []
    for ahead in (False, True):
        settings = EngineSettings(
            device="cuda", dtype="bfloat16", kernels="native", block_size=4, kv_blocks=64,
            deterministic=True,
        )  # fmt: skip
        engine = Engine.load(tiny_reference[0], settings)
        assert engine._runner.ahead
        engine._runner.ahead = ahead
        for number, prompt in enumerate(PROMPTS):
            params = SamplingParams(
                temperature=0.8 * (number > 0), seed=number, max_tokens=20, ignore_eos=True,
                stop_token_ids=tuple(range(4 * number)),
            )  # fmt: skip
            engine.add(str(number), prompt, params)
        told: dict[str, list[Any]] = {}
        while engine.has_work():
            for output in engine.step():
                told.setdefault(output.request_id, []).extend(output.token_ids)
            engine.check()
        found.append(told)
        assert engine.stats().blocks_used == 0
    assert found[0] == found[1]
