"""Who owns which block of the KV cache."""

from infopt.core.errors import UsageError


class BlockPool:
    """Blocks 0 to total - 1, each free or owned by as many as share it; all is O(1) a block.

    The last block freed is the first one taken: it is the warmest, and memory that a small load
    never needs is never touched.
    """

    def __init__(self, total: int) -> None:
        if total < 1:
            raise UsageError(f"the KV cache needs at least one block (got {total})")
        self._free = list(range(total - 1, -1, -1))
        self._owners = [0] * total

    @property
    def total(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def take(self, count: int) -> list[int]:
        """That many blocks with one owner each; the caller has seen that so many are free."""
        assert 0 <= count <= self.free
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """One more owner for a block that has one."""
        assert self._owners[block] > 0
        self._owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner fewer for each; a block without an owner is free.

        The last block goes first, so that the same blocks are taken again in the same order.
        """
        for block in reversed(blocks):
            assert self._owners[block] > 0
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)

    def check(self) -> None:
        """Assert the invariant: each block is either free, once, or owned."""
        owned = sum(owners > 0 for owners in self._owners)
        assert owned + self.free == self.total
        assert len(set(self._free)) == self.free
        assert all(self._owners[block] == 0 for block in self._free)
