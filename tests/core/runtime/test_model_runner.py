"""Blocks saved, copied and brought back, in this order, in every layer."""

from collections.abc import Callable

import torch

from infopt.core.runtime.engine import Engine
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.prefix_store import PrefixStore
from infopt.core.runtime.scheduler import Step


def runner_with(engine: Engine, limit: int) -> ModelRunner:
    runner = engine._runner
    runner.store = PrefixStore(limit)
    for number, layer in enumerate(runner.cache.layers):
        for block in range(runner.cache.blocks):
            layer[block] = 100.0 * number + block
    return runner


def held(runner: ModelRunner, block: int) -> list[float]:
    """What a block holds in each layer, the same in each slot."""
    values = []
    for layer in runner.cache.layers:
        assert bool((layer[block] == layer[block].flatten()[0]).all())
        values.append(float(layer[block].flatten()[0]))
    return values


def test_copies_leave_the_source_and_all_others(make_engine: Callable[..., Engine]) -> None:
    runner = runner_with(make_engine(kv_blocks=8), 0)
    runner.move_blocks(Step([], copies=[(2, 5), (2, 6), (3, 0)]))
    wanted = {5: 2, 6: 2, 0: 3}
    for block in range(8):
        assert held(runner, block) == [wanted.get(block, block), 100 + wanted.get(block, block)]


def test_a_block_that_is_overwritten_is_saved_as_it_was(make_engine: Callable[..., Engine]) -> None:
    """Saved, then a copy's target, and another brought back, all in one step."""
    runner = runner_with(make_engine(kv_blocks=8), 10**6)
    assert runner.store is not None
    runner.move_blocks(Step([], spills=[(1, b"one"), (4, b"four")]))
    assert len(runner.store) == 2
    one = runner.store.get(b"one")
    assert one is not None
    runner.move_blocks(Step([], [(5, b"five")], copies=[(2, 5)], restores=[(one, 6)]))
    assert held(runner, 5) == [2, 102] and held(runner, 6) == [1, 101]
    five, four = runner.store.get(b"five"), runner.store.get(b"four")
    assert five is not None and four is not None
    runner.move_blocks(Step([], restores=[(five, 0), (four, 1)]))
    assert held(runner, 0) == [5, 105] and held(runner, 1) == [4, 104]


def test_what_is_brought_back_survives_that_saving_pushes_it_out(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(kv_blocks=8)
    one = sum(layer[0].nbytes for layer in engine._runner.cache.layers)
    runner = runner_with(engine, one)
    runner.move_blocks(Step([], spills=[(1, b"one")]))
    assert runner.store is not None
    content = runner.store.get(b"one")
    assert content is not None
    runner.move_blocks(Step([], spills=[(3, b"three")], restores=[(content, 3)]))
    assert held(runner, 3) == [1, 101]
    assert b"one" not in runner.store and b"three" in runner.store
    assert runner.store.nbytes == one


def test_a_saved_block_keeps_no_other_alive(make_engine: Callable[..., Engine]) -> None:
    runner = runner_with(make_engine(kv_blocks=8), 10**6)
    for content in runner.cache.read([1, 2, 3]):
        assert content.untyped_storage().nbytes() == content.nbytes
        assert torch.equal(content[0], torch.full_like(content[0], float(content[0].max())))
