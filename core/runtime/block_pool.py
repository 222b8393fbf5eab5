"""Who owns which block of the KV cache, and which free block still holds something known."""

from collections import Counter
from collections.abc import Iterable, Sequence

from infopt.core.errors import UsageError

NO_BLOCK = -1
"""Stands in a table for a block that was given back because nothing looks at it any more."""


class BlockPool:
    """Blocks 0 to total - 1, each free or owned by as many as share it; all is O(1) a block.

    A block may be named by a digest of what it holds, and keeps its name when it is freed: found by
    that name it is owned again, and only when it is taken for something else is it forgotten. The
    free list is a ring of links, so that a block found leaves it from the middle. It is taken from
    its front. Nameless blocks are freed to the front, for they are worth nothing and the last one
    freed is the warmest; named ones to the back, so that the least recently used goes first.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise UsageError(f"the KV cache needs at least one block (got {total})")
        self.total = total
        self.free = total
        self.cached = 0
        """Free blocks that have a name."""
        self.evicted: list[tuple[int, bytes]] = []
        """Blocks that lost their names to others since this was last emptied."""
        self._owners = [0] * total
        self._names: list[bytes | None] = [None] * total
        self._by_name: dict[bytes, int] = {}
        # The ring of free blocks; `total` stands between its end and its beginning.
        self._next = [*range(1, total + 1), 0]
        self._previous = [total, *range(total)]

    @property
    def used(self) -> int:
        return self.total - self.free

    def take(self, count: int) -> list[int]:
        """That many nameless blocks with one owner each; the caller saw that so many are free."""
        assert 0 <= count <= self.free
        blocks = []
        for _ in range(count):
            block = self._next[self.total]
            name = self._names[block]
            if name is not None:
                self.evicted.append((block, name))
                self.forget(block)
            self._unlink(block)
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def owners(self, block: int) -> int:
        """How many share it; 0 is free."""
        return self._owners[block]

    def share(self, block: int) -> None:
        """One more owner for a block that has one, or that is free and was found by its name."""
        if not self._owners[block]:
            assert self._names[block] is not None
            self._unlink(block)
            self.cached -= 1
        self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer for each; a block without an owner is free.

        The last block goes first: a prefix is longer of use than what follows it.
        """
        for block in reversed(blocks):
            if block == NO_BLOCK:
                continue
            assert self._owners[block] > 0
            self._owners[block] -= 1
            if not self._owners[block]:
                named = self._names[block] is not None
                self.cached += named
                self._link(block, after=self._previous[self.total] if named else self.total)

    def name(self, block: int, name: bytes) -> None:
        """Let an owned block be found by `name`, unless another one is or it has a name already."""
        assert self._owners[block] > 0
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def find(self, name: bytes) -> int | None:
        """The block of this name, owned or free."""
        return self._by_name.get(name)

    def name_of(self, block: int) -> bytes | None:
        return self._names[block]

    def named(self) -> list[tuple[int, bytes]]:
        """All blocks that can be found, and their names: the free ones as they would go, then the
        owned."""
        ring, block = [], self._next[self.total]
        while block != self.total:
            ring.append(block)
            block = self._next[block]
        owned = [block for block in range(self.total) if self._owners[block]]
        names = ((block, self._names[block]) for block in ring + owned)
        return [(block, name) for block, name in names if name is not None]

    def forget(self, block: int) -> None:
        """Take the block's name away; it is found no more."""
        name, self._names[block] = self._names[block], None
        if name is not None:
            del self._by_name[name]
            self.cached -= not self._owners[block]

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that each block is free once or owned, and owned as often as in the `tables`."""
        ring, block = [], self._next[self.total]
        while block != self.total:
            ring.append(block)
            assert len(ring) <= self.total and self._previous[self._next[block]] == block
            block = self._next[block]
        assert len(ring) == self.free and all(self._owners[block] == 0 for block in ring)
        assert sum(owners > 0 for owners in self._owners) + self.free == self.total
        named = {name: block for block, name in enumerate(self._names) if name is not None}
        assert named == self._by_name
        assert self.cached == sum(self._names[block] is not None for block in ring)
        if tables is not None:
            held = Counter(block for table in tables for block in table if block != NO_BLOCK)
            assert [held[block] for block in range(self.total)] == self._owners

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.free -= 1

    def _link(self, block: int, *, after: int) -> None:
        before, following = after, self._next[after]
        self._next[before] = self._previous[following] = block
        self._previous[block], self._next[block] = before, following
        self.free += 1
