"""Blocks found again by the tokens that lead up to them."""

import array
import hashlib
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from infopt.core.runtime.block_pool import NO_BLOCK, BlockPool
from infopt.core.runtime.request import Request


class Tier(Protocol):
    """Where the contents of evicted blocks may still be."""

    def __contains__(self, digest: bytes) -> bool: ...

    def get(self, digest: bytes) -> Tensor | None:
        """None where it cannot be had after all; it is then no longer contained."""


def root_digest(salt: str) -> bytes:
    """What the chain of a sequence begins with: other salts, other chains, nothing shared."""
    return hashlib.sha256(salt.encode(errors="surrogatepass")).digest()


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """SHA-256 over the block before and this block's tokens: it names all tokens up to here.

    Who shares a block trusts the digest alone, so it has to be one that nobody can collide.
    """
    return hashlib.sha256(parent + array.array("q", tokens).tobytes()).digest()


def extend_digests(digests: list[bytes], request: Request, block_size: int, count: int) -> None:
    """Make `digests` those of the request's first `count` blocks, all full, or leave it longer."""
    parent = digests[-1] if digests else root_digest(request.params.cache_salt)
    for index in range(len(digests), count):
        parent = block_digest(parent, request.tokens[index * block_size : (index + 1) * block_size])
        digests.append(parent)


class PrefixCache:
    """Names full blocks once their keys and values are computed, and finds them for others."""

    def __init__(self, pool: BlockPool, block_size: int, tier: Tier | None = None) -> None:
        self._pool = pool
        self._block_size = block_size
        self._tier = tier

    def match(self, request: Request) -> list[int | None]:
        """The blocks of the longest known prefix; None stands for one that a lower tier holds.

        At least the last token is left to compute, since its logits are wanted: where every token
        is known, the last block is not taken, so that nobody writes into a block of others. The
        logits of a prompt that is to be scored are wanted from its beginning.
        """
        limit = request.reusable // self._block_size
        found: list[int | None] = []
        for index in range(limit):
            extend_digests(request.digests, request, self._block_size, index + 1)
            block = self._pool.find(request.digests[index])
            if block is None and not self._lies_below(request.digests[index]):
                break
            found.append(block)
        return found

    def fetch(self, digests: Sequence[bytes]) -> list[Tensor] | None:
        """What the lower tier holds under these; None where it has lost one, and says so now."""
        found: list[Tensor] = []
        # The last one first, so that it is the first to go: a prefix is longer of use.
        for digest in reversed(digests):
            content = None if self._tier is None else self._tier.get(digest)
            if content is None:
                return None
            found.append(content)
        return found[::-1]

    def publish(self, request: Request) -> None:
        """Name the blocks that have become full and computed."""
        full = request.computed // self._block_size
        extend_digests(request.digests, request, self._block_size, full)
        for index in range(request.published, full):
            if request.blocks[index] != NO_BLOCK:
                self._pool.name(request.blocks[index], request.digests[index])
        request.published = max(request.published, full)

    def forget(self, request: Request) -> None:
        """Let nobody find the blocks of this request: what they hold is not to be trusted."""
        for block in request.blocks:
            if block != NO_BLOCK:
                self._pool.forget(block)
        request.published = len(request.tokens)

    def _lies_below(self, digest: bytes) -> bool:
        return self._tier is not None and digest in self._tier
