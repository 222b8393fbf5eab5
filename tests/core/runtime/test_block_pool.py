"""The pool against a model of it, under any sequence of operations."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infopt.core.errors import UsageError
from infopt.core.runtime.block_pool import NO_BLOCK, BlockPool

NAMES = [bytes([n]) for n in range(8)]


class Pool(RuleBasedStateMachine):
    """Owners hold tables of blocks; a block may stand in several; free ones keep their names.

    `free` is the order in which blocks are to be taken, as a plain list.
    """

    @initialize(total=st.integers(1, 12))
    def start(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.free = list(range(total))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.free))
        self.pool.evicted.clear()
        taken = self.pool.take(count)
        assert taken == self.free[:count]
        lost = [(block, self.names.pop(block)) for block in taken if block in self.names]
        assert self.pool.evicted == lost
        del self.free[:count]
        self.tables.append(taken)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([t for t in self.tables if t]))
        for block in table:
            self.pool.share(block)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        kept = {block for other in self.tables for block in other}
        for block in reversed(table):
            if block not in kept:
                self.free.insert(len(self.free) if block in self.names else 0, block)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def name(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(sorted({b for table in self.tables for b in table})))
        self.pool.name(block, name)
        if block not in self.names and name not in self.names.values():
            self.names[block] = name

    @rule(name=st.sampled_from(NAMES))
    def find_and_own(self, name: bytes) -> None:
        block = self.pool.find(name)
        assert block == next((b for b, n in self.names.items() if n == name), None)
        if block is not None:
            self.pool.share(block)
            self.tables.append([block])
            if block in self.free:
                self.free.remove(block)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.names)))
        self.pool.forget(block)
        del self.names[block]

    @invariant()
    def free_and_used_are_all(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.free + self.pool.used == self.pool.total
        owners = Counter(block for table in self.tables for block in table)
        assert self.pool.used == len(owners)
        assert all(self.pool.owners(block) == owners[block] for block in range(self.pool.total))
        assert self.pool.cached == sum(block in self.names for block in self.free)
        assert all(self.pool.name_of(b) == self.names.get(b) for b in range(self.pool.total))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


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


def test_the_least_recently_used_name_goes_first_and_a_prefix_after_its_tail() -> None:
    pool = BlockPool(6)
    old, new = pool.take(2), pool.take(2)
    for block, name in zip(old + new, NAMES, strict=False):
        pool.name(block, name)
    pool.release(old)
    pool.release(new)
    assert pool.cached == 4
    assert pool.take(2) == [4, 5], "those that hold nothing go before all that do"
    assert pool.take(4) == [old[1], old[0], new[1], new[0]]
    assert [block for block, _ in pool.evicted] == [old[1], old[0], new[1], new[0]]


def test_a_block_found_is_not_taken_by_others() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.name(block, b"a")
    pool.release([block])
    pool.share(block)
    assert pool.free == 1 and pool.take(1) != [block]
    assert pool.find(b"a") == block


def test_of_two_blocks_with_the_same_contents_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.take(2)
    pool.name(first, b"a")
    pool.name(second, b"a")
    pool.release([second])
    assert pool.find(b"a") == first and pool.cached == 0


def test_tables_may_have_gaps() -> None:
    pool = BlockPool(2)
    table = pool.take(2)
    pool.release([table[0]])
    table[0] = NO_BLOCK
    pool.check([table])
    pool.release(table)
    assert pool.used == 0


def test_taking_too_many_releasing_twice_and_owning_the_nameless_are_faults_of_ours() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    table = pool.take(1)
    pool.release(table)
    with pytest.raises(AssertionError):
        pool.release(table)
    with pytest.raises(AssertionError):
        pool.share(table[0])
    with pytest.raises(AssertionError):
        pool.name(table[0], b"a")


def test_check_finds_what_is_out_of_order() -> None:
    def broken(change: str) -> BlockPool:
        pool = BlockPool(3)
        table = pool.take(2)
        pool.name(table[0], b"a")
        pool.release(table[:1])
        pool.check([table[1:]])
        match change:
            case "lost":
                pool._unlink(2)
            case "owned twice":
                pool._owners[table[1]] = 2
            case "name":
                pool._by_name[b"a"] = 2
            case "count":
                pool.free = 1
            case "cached":
                pool.cached = 2
        return pool

    for change in ("lost", "owned twice", "name", "count", "cached"):
        with pytest.raises(AssertionError):
            broken(change).check([[1]])


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(UsageError):
        BlockPool(0)


def test_the_named_are_told_as_they_would_go_and_the_owned_last() -> None:
    pool = BlockPool(6)
    blocks = pool.take(5)
    for block in blocks[:4]:
        pool.name(block, bytes([block]))
    pool.release([blocks[2]])
    pool.release(blocks[:2])
    free = [blocks[2], blocks[1], blocks[0]]
    assert pool.named() == [(block, bytes([block])) for block in [*free, blocks[3]]]
    pool.release(blocks[3:])
    pool.take(pool.free)
    assert [block for block, _ in pool.evicted] == [*free, blocks[3]] and pool.named() == []
