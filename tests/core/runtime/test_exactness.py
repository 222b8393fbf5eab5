"""In float32 no answer depends on what was beside it, how it was chunked, found, preempted, forked.

Greedy tokens are those of transformers; drawn ones those of the request alone.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infopt.core.artifact.read import Artifact
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams

MakeEngine = Callable[..., Engine]
Answers = dict[tuple[str, int], list[int]]
NEW = 8
LENGTHS = (1, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 40)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def greedy(n: int = 1, salt: str = "") -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, n=n, cache_salt=salt)


def drawn(seed: int, n: int = 1, priority: int = 0) -> SamplingParams:
    return SamplingParams(6, temperature=0.8, top_p=0.9, seed=seed, n=n, priority=priority)


def finish(engine: Engine) -> Answers:
    """Step to the end; every step leaves the blocks in order."""
    made: Answers = {}
    ended: set[tuple[str, int]] = set()
    while engine.has_work():
        for output in engine.step():
            key = (output.request_id, output.index)
            assert key not in ended
            made.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output
                ended.add(key)
        engine.check()
    assert ended == made.keys() and engine.stats().blocks_used == 0
    return made


@pytest.fixture(scope="module")
def wanted(tiny_reference: tuple[Artifact, Any]) -> list[tuple[list[int], list[int]]]:
    """Prompts, some with beginnings in common, and what transformers makes of them."""
    beginning = prompt_of(40, seed=99)
    prompts = [prompt_of(n, seed=n) for n in LENGTHS]
    prompts += [beginning[:n] + prompt_of(3, seed=n) for n in (4, 8, 16, 31, 37)]
    model = tiny_reference[1]
    found = []
    for prompt in prompts:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=NEW,
        )
        found.append((prompt, made[0, len(prompt) :].tolist()))
    return found


@pytest.mark.parametrize(
    ("block_size", "budget", "tight", "caching", "n"),
    list(itertools.product((1, 4, 16), (3, 64), (False, True), (False, True), (1, 3))),
)
def test_greedy_equals_transformers_however_it_is_run(
    make_engine: MakeEngine,
    wanted: list[tuple[list[int], list[int]]],
    block_size: int,
    budget: int,
    tight: bool,
    caching: bool,
    n: int,
) -> None:
    """Twice over, so that where there is caching every prompt is found the second time."""
    longest = max(len(prompt) for prompt, _ in wanted) + NEW
    engine = make_engine(
        block_size=block_size,
        max_batch_tokens=budget,
        kv_blocks=(-(-longest // block_size) + 1) if tight else 1600 // block_size,
        prefix_caching=caching,
        prefix_host_bytes=20_000 if caching and tight else 0,
    )
    for turn in range(2):
        before = engine.stats()
        for index, (prompt, _) in enumerate(wanted):
            engine.add(str(index), prompt, greedy(n))
        made = finish(engine)
        for index, (_, tokens) in enumerate(wanted):
            for answer in range(n):
                assert made[str(index), answer] == tokens, (turn, index, answer)
    after = engine.stats()
    assert after.preemptions > 0 or not tight, "a tight pool is here to preempt"
    if caching and not tight:
        full = sum((len(prompt) - 1) // block_size * block_size for prompt, _ in wanted)
        assert after.prefix_hits - before.prefix_hits == full
    assert caching or after.prefix_hits == after.blocks_cached == 0


@pytest.mark.parametrize("batching", ["static", "dynamic"])
def test_greedy_equals_transformers_in_every_kind_of_batch(
    make_engine: MakeEngine, wanted: list[tuple[list[int], list[int]]], batching: str
) -> None:
    engine = make_engine(batching=batching, max_running=5, kv_blocks=40)
    for index, (prompt, _) in enumerate(wanted):
        engine.add(str(index), prompt, greedy())
    made = finish(engine)
    assert [made[str(i), 0] for i in range(len(wanted))] == [tokens for _, tokens in wanted]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=5),
    common=st.integers(0, 24),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 40),
    chunk=st.none() | st.integers(1, 9),
    running=st.integers(1, 6),
    spare=st.integers(0, 6),
    n=st.integers(1, 4),
    host=st.sampled_from([0, 10_000]),
    watermark=st.sampled_from([0.0, 0.3]),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_request_does_not_depend_on_its_neighbours(
    make_engine: MakeEngine,
    lengths: list[tuple[int, int]],
    common: int,
    block_size: int,
    budget: int,
    chunk: int | None,
    running: int,
    spare: int,
    n: int,
    host: int,
    watermark: float,
) -> None:
    """Drawn tokens, each request with its seed: each answer alone with plenty, all crowded."""
    beginning = prompt_of(common, seed=7)
    prompts = [(beginning + prompt_of(length, seed=i))[:length] for i, (length, _) in
               enumerate(lengths)]  # fmt: skip
    alone = make_engine(prefix_caching=False)
    crowded = make_engine(
        block_size=block_size,
        max_batch_tokens=budget,
        max_chunk_tokens=chunk,
        max_running=running,
        kv_blocks=-(-(max(map(len, prompts)) + 6) // block_size) + spare,
        prefix_host_bytes=host,
        watermark=watermark,
    )
    singly: Answers = {}
    for index, prompt in enumerate(prompts):
        for answer in range(n):
            alone.add(str(index), prompt, drawn(10 * index + answer))
            singly[str(index), answer] = finish(alone)[str(index), 0]
    for turn in range(2):
        for index, prompt in enumerate(prompts):
            crowded.add(str(index), prompt, drawn(10 * index, n, lengths[index][1]))
        assert finish(crowded) == singly, f"turn {turn}"


@pytest.mark.parametrize("block_size", [1, 4, 9])
def test_a_prompt_found_as_a_whole_computes_its_last_block_alone(
    make_engine: MakeEngine, block_size: int
) -> None:
    engine = make_engine(block_size=block_size, kv_blocks=64)
    for prompt in (prompt_of(4 * block_size), prompt_of(block_size, seed=1)):
        engine.add("x", prompt, greedy())
        first = finish(engine)
        before = engine.stats()
        for _ in range(2):
            engine.add("x", prompt, greedy())
            assert finish(engine) == first
        hits = engine.stats().prefix_hits - before.prefix_hits
        assert hits == 2 * (len(prompt) - block_size)


def test_a_preempted_request_finds_its_own_blocks(make_engine: MakeEngine) -> None:
    """Preempted and found again at once, in a pool that is hardly larger than the request."""
    plenty = make_engine(prefix_caching=False)
    prompts = [prompt_of(20, seed=s) for s in range(3)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        plenty.add(str(index), prompt, params)
    found = finish(plenty)
    for host in (0, 10**6):
        engine = make_engine(kv_blocks=13, prefix_host_bytes=host)
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, params)
        assert finish(engine) == found
        assert engine.stats().preemptions > 0
        computed = engine.stats().tokens
        assert computed < plenty.stats().tokens * 2
        assert bool(host) == bool(engine.stats().host_bytes)


def test_the_second_tier_gives_back_what_the_pool_gave_up(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_blocks=8, prefix_host_bytes=10**6)
    prompts = [prompt_of(24, seed=s) for s in range(4)]
    made = []
    for _ in range(2):
        before = engine.stats().prefix_hits
        for prompt in prompts:
            engine.add("x", prompt, greedy())
            made.append(finish(engine))
    assert made[:4] == made[4:]
    assert engine.stats().prefix_hits - before == 4 * 20
    small = make_engine(kv_blocks=8)
    for prompt in prompts * 2:
        small.add("x", prompt, greedy())
        finish(small)
    assert small.stats().prefix_hits == 0


def test_salts_share_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    made = []
    for salt in ("", "tenant a", "tenant b", "tenant a"):
        before = engine.stats().prefix_hits
        engine.add("x", prompt_of(17), greedy(salt=salt))
        made.append((finish(engine), engine.stats().prefix_hits - before))
    assert [hits for _, hits in made] == [0, 0, 0, 16]
    assert all(answer == made[0][0] for answer, _ in made)


def test_answers_share_the_blocks_of_their_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4, kv_blocks=32)
    engine.add("x", prompt_of(18), drawn(seed=3, n=5))
    engine.step()
    assert engine.stats().running == 5 and engine.stats().blocks_used == 5
    engine.step()
    assert engine.stats().blocks_used == 4 + 5, "each has the block that it writes to itself"
    made = finish(engine)
    assert len({tuple(tokens) for tokens in made.values()}) > 1


def test_answers_end_one_by_one_or_all_together(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(6), drawn(seed=3, n=3))
    engine.abort("x")
    assert [(o.index, o.finish_reason) for o in engine.step()] == [(i, "abort") for i in range(3)]
    engine.add("x", prompt_of(6), drawn(seed=3, n=3))
    engine.abort("x", 0)  # has not begun: the others are to come from it
    engine.step()
    engine.abort("x", 1)
    engine.abort("x", 7)
    said = {o.index: o.finish_reason for o in engine.step()}
    assert said == {0: None, 1: "abort", 2: None}
    engine.abort("x")
    assert engine.stats().blocks_used == 0
    assert {o.index for o in engine.step()} == {0, 2} and not engine.has_work()


def test_the_blocks_of_a_failed_request_are_found_by_nobody(make_engine: MakeEngine) -> None:
    """Something went wrong once: who comes with the same prompt later computes it anew."""
    engine = make_engine()
    engine.add("x", prompt_of(9), greedy())
    good = finish(engine)["x", 0]
    engine = make_engine()
    weight = engine._runner.decoder.layers[0].mlp.down.weight
    saved = weight.clone()
    weight.fill_(torch.nan)
    engine.add("x", prompt_of(9), greedy())
    assert [o.finish_reason for o in engine.step()] == ["error"]
    weight.copy_(saved)
    engine.add("x", prompt_of(9), greedy())
    assert finish(engine)["x", 0] == good


def test_counts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add("x", prompt_of(9), greedy())
    engine.step()
    first = engine.stats()
    assert (first.steps, first.tokens, first.step_tokens, first.running) == (1, 9, 9, 1)
    finish(engine)
    stats = engine.stats()
    assert (stats.steps, stats.tokens, stats.step_tokens) == (NEW, 9 + NEW - 1, 1)
    assert (stats.prefix_queries, stats.prefix_hits) == (9, 0)
    assert stats.blocks_cached == (9 + NEW - 1) // 4 and stats.blocks_used == 0
    assert min(stats.schedule_s, stats.build_s, stats.forward_s, stats.sample_s) > 0
