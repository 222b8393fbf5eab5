"""The second tier: what evicted prefix blocks held, in host memory, and what lies below it."""

from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from infopt.core.runtime.prefix_disk import PrefixDisk


class PrefixStore:
    """Contents of blocks by their digests, up to `limit` bytes; the least recently used goes first.

    It goes to the disk `below`, where there is one; what is there is contained as well. On a GPU
    this is a second and larger memory; on a CPU it is the same memory, and is of use only where the
    pool is kept small.
    """

    def __init__(self, limit: int, below: "PrefixDisk | None" = None) -> None:
        self.limit = limit
        self.below = below
        self.nbytes = 0
        """In memory."""
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held or (self.below is not None and digest in self.below)

    def __len__(self) -> int:
        return len(self._held)

    def wants(self, digest: bytes) -> bool:
        """Whether to put this would change anything but its rank."""
        if self.limit or self.below is None:
            return digest not in self._held
        return digest not in self.below

    def get(self, digest: bytes) -> Tensor | None:
        """What was put under this digest, which is then the most recently used.

        None where it cannot be had any more; it is then no longer contained either.
        """
        if digest in self._held:
            self._held.move_to_end(digest)
            return self._held[digest]
        return None if self.below is None else self.below.get(digest)

    def put(self, digest: bytes, content: Tensor) -> None:
        """Keep the content; one that is larger than the limit is not kept in memory."""
        if content.nbytes > self.limit:
            self._sink(digest, content)
            return
        self.nbytes += content.nbytes
        if (before := self._held.pop(digest, None)) is not None:
            self.nbytes -= before.nbytes
        self._held[digest] = content
        while self.nbytes > self.limit:
            name, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self._sink(name, oldest)

    def sink(self) -> None:
        """Put all of it on the disk as well."""
        for digest, content in self._held.items():
            self._sink(digest, content)

    def _sink(self, digest: bytes, content: Tensor) -> None:
        if self.below is not None:
            self.below.put(digest, content)
