"""Steps that are replayed: which ones, that they are as ordinary ones, and what is told of them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.layers.choice import NativeChoice
from infopt.core.models.decoder import Decoder
from infopt.core.models.load import load_decoder
from infopt.core.runtime.batch import Span, step_inputs
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.kv_cache import KVCache
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.step_program import MOST_ROWS
from infopt.kernels.cpu.native import NativeError, load

try:
    load()
except NativeError as error:
    pytest.skip(str(error), allow_module_level=True)

CPU = torch.device("cpu")
MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


@pytest.fixture
def runners(tiny_reference: tuple[Artifact, Any]) -> tuple[ModelRunner, ModelRunner]:
    """One that replays and one that does not, of the same weights and like caches."""
    packed = load_decoder(
        tiny_reference[0], torch.float32, CPU, native=NativeChoice(load(), torch.float32, None)
    )
    return runner_pair(packed, load_decoder(tiny_reference[0], torch.float32, CPU))


def runner_pair(replaying: Decoder, ordinary: Decoder) -> tuple[ModelRunner, ModelRunner]:

    def cache() -> KVCache:
        made = KVCache(ordinary.config, blocks=80, block_size=4, dtype=torch.float32, device=CPU)
        for layer in made.layers:
            layer.fill_(torch.nan)
        return made

    return ModelRunner.recorded("native", replaying, cache()), ModelRunner(ordinary, cache())


def both(runners: Sequence[ModelRunner], spans: list[Span], rows: list[int] | None = None) -> int:
    """Run a step on either, compare, and return how many steps were replayed so far."""
    inputs = step_inputs(spans, block_size=4, dtype=torch.float32, device=CPU)
    wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    ours, theirs = (runner.run(inputs, wanted) for runner in runners)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for one, other in zip(*(runner.cache.layers for runner in runners), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    return runners[0].replays.count


def test_any_mixture_of_tokens(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """Single tokens and chunks, over what was cached before, and ever larger steps."""
    one, two, three = prompt_of(60, 1), prompt_of(60, 2), prompt_of(60, 3)
    a, b, c = range(0, 20), range(20, 40), range(60, 40, -1)
    assert both(runners, [Span(one[:1], 0, a)]) == 1
    assert both(runners, [Span(one[1:2], 1, a), Span(two[:9], 0, b)], [0, 9]) == 2
    assert both(runners, [Span(one[2:3], 2, a), Span(two[9:10], 9, b)]) == 3
    assert both(runners, [Span(three[:57], 0, c)], [56]) == 4
    assert (
        both(runners, [Span(two[10:11], 10, b), Span(three[57:58], 57, c), Span(one[3:33], 3, a)])
        == 5
    )
    assert both(runners, [Span(one[33:35], 33, a)], []) == 6, "nobody samples"
    assert both(runners, [Span(one[35:36], 35, a)]) == 7
    assert (
        both(runners, [Span(two[11:15], 11, b), Span(one[36:60], 36, a), Span(three[58:60], 58, c)])
        == 8
    )


def test_weights_that_are_not_packed_are_for_few_tokens(
    tiny_reference: tuple[Artifact, Any],
) -> None:
    decoder = load_decoder(tiny_reference[0], torch.float32, CPU)
    runners, tokens = runner_pair(decoder, decoder), prompt_of(40)
    assert both(runners, [Span(tokens[:9], 0, range(20))]) == 0
    assert both(runners, [Span(tokens[9:17], 9, range(20))]) == 1


def test_a_very_large_step_is_not_replayed(
    runners: tuple[ModelRunner, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 512 <= MOST_ROWS <= 4096
    tokens = prompt_of(60)
    both(runners, [Span(tokens[:5], 0, range(20))])
    steps = runners[0].replays._steps
    assert steps is not None
    monkeypatch.setattr(steps, "_most", 33)
    assert both(runners, [Span(tokens[:34], 0, range(20))]) == 1
    assert both(runners, [Span(tokens[:33], 0, range(20))]) == 2


def test_threads_may_change(runners: tuple[ModelRunner, ModelRunner]) -> None:
    before = torch.get_num_threads()
    try:
        for position, threads in enumerate((1, 2, 1)):
            torch.set_num_threads(threads)
            span = Span(prompt_of(3)[position : position + 1], position, [7])
            assert both(runners, [span]) == position + 1
    finally:
        torch.set_num_threads(before)


def test_within_inference_mode_and_out_of_it(runners: tuple[ModelRunner, ModelRunner]) -> None:
    with torch.inference_mode():
        both(runners, [Span(prompt_of(5), 0, [1, 2])])
    inputs = step_inputs([Span([5], 5, [1, 2])], block_size=4, dtype=torch.float32, device=CPU)
    program = runners[0].replays.program
    assert program is not None
    times = program.times(inputs)
    assert min(times.operators.values()) > 0 and len(times.layers) == 2
    assert sum(times.layers) < sum(times.operators.values())


def finish(engine: Engine, count: int) -> list[list[int]]:
    for n in range(count):
        engine.add(str(n), prompt_of(3 + 5 * n, n), GREEDY)
    made: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            made.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check()
    return [made[str(n)] for n in range(count)]


def test_an_engine_replays_and_says_how_often(make_engine: MakeEngine) -> None:
    replaying, ordinary = make_engine(kv_blocks=64), make_engine(kv_blocks=64, kernels="torch")
    assert finish(replaying, 6) == finish(ordinary, 6)
    stats, theirs = replaying.stats(), ordinary.stats()
    assert stats.not_replayed is None and 5 <= stats.replayed < stats.steps
    assert theirs.replayed == 0 and theirs.not_replayed is not None


@pytest.mark.parametrize(
    ("settings", "word"), [({"deterministic": True}, "recorded"), ({"kv_dtype": "fp8"}, "cache")]
)
def test_what_cannot_be_replayed_is_told(
    settings: dict[str, Any], word: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(**settings)
    finish(engine, 2)
    stats = engine.stats()
    assert stats.replayed == 0 and stats.not_replayed is not None and word in stats.not_replayed


def test_int8_keys_and_values(make_engine: MakeEngine) -> None:
    """Prefilled part by part and decoded by replay: as part by part throughout."""
    replaying = make_engine(kv_dtype="int8", kv_blocks=64)
    made = finish(replaying, 5)
    assert replaying.stats().replayed > 0
    assert made == finish(make_engine(kv_dtype="int8", kv_blocks=64, kernels="torch"), 5)


def test_a_replayed_step_whose_logits_are_not_finite_names_the_layer(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(kernels="native")
    engine.add("broken", prompt_of(3), GREEDY)
    (first,) = engine.step()
    assert first.token_ids
    cache = engine._runner.cache.layers[1]
    cache[:, :, 1] = torch.inf  # values that the second layer reads
    (last,) = engine.step()
    assert engine._runner.replays.program is not None
    assert last.finish_reason == "error" and last.error is not None
    assert "layers.1.self_attn" in last.error
