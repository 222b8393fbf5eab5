"""The pool against a model of it, under any sequence of operations."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infopt.core.errors import UsageError
from infopt.core.runtime.block_pool import BlockPool


class Pool(RuleBasedStateMachine):
    """Owners hold tables of blocks; a block may stand in several."""

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.tables: list[list[int]] = []

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        self.tables.append(self.pool.take(data.draw(st.integers(0, self.pool.free))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        for block in table:
            self.pool.share(block)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def free_and_used_are_all(self) -> None:
        self.pool.check()
        assert self.pool.free + self.pool.used == self.pool.total
        owners = Counter(block for table in self.tables for block in table)
        assert self.pool.used == len(owners)
        assert all(0 <= block < self.pool.total for block in owners)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_blocks_released_are_taken_again_in_the_same_order() -> None:
    pool = BlockPool(8)
    table = pool.take(3)
    pool.take(2)
    pool.release(table)
    assert pool.take(3) == table


def test_a_shared_block_is_free_when_its_last_owner_lets_go() -> None:
    pool = BlockPool(2)
    table = pool.take(1)
    pool.share(table[0])
    pool.release(table)
    assert pool.used == 1
    pool.release(table)
    assert pool.used == 0


def test_taking_too_many_and_releasing_twice_are_faults_of_ours() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    table = pool.take(1)
    pool.release(table)
    with pytest.raises(AssertionError):
        pool.release(table)


def test_check_finds_a_block_that_is_lost() -> None:
    pool = BlockPool(3)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(UsageError):
        BlockPool(0)
