"""The second tier: what evicted prefix blocks held, in host memory."""

from collections import OrderedDict

from torch import Tensor


class PrefixStore:
    """Contents of blocks by their digests, up to `limit` bytes; the least recently used goes first.

    On a GPU this is a second and larger memory; on a CPU it is the same memory, and is of use only
    where the pool is kept small.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    def get(self, digest: bytes) -> Tensor:
        """What was put under this digest, which is then the most recently used."""
        self._held.move_to_end(digest)
        return self._held[digest]

    def put(self, digest: bytes, content: Tensor) -> None:
        """Keep the content; one that is larger than the limit is not kept."""
        if content.nbytes > self.limit:
            return
        self.nbytes += content.nbytes
        if (before := self._held.pop(digest, None)) is not None:
            self.nbytes -= before.nbytes
        self._held[digest] = content
        while self.nbytes > self.limit:
            _, oldest = self._held.popitem(last=False)
            self.nbytes -= oldest.nbytes
