import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.runtime.block_pool import BlockPool
from infopt.core.runtime.prefix_cache import (
    PrefixCache,
    block_digest,
    extend_digests,
    root_digest,
)
from infopt.core.runtime.request import Request, SamplingParams


def make_request(tokens: list[int], salt: str = "") -> Request:
    return Request("x", SamplingParams(cache_salt=salt), tokens, 100, torch.Generator())


def computed(pool: BlockPool, cache: PrefixCache, tokens: list[int], salt: str = "") -> Request:
    """A request whose tokens are all in its blocks, of two slots each."""
    request = make_request(tokens, salt)
    request.blocks = pool.take(-(-len(tokens) // 2))
    request.computed = len(tokens)
    cache.publish(request)
    return request


@given(
    left=st.lists(st.integers(0, 2**31), max_size=9),
    right=st.lists(st.integers(0, 2**31), max_size=9),
    salts=st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(["", "a", "b"])),
    size=st.integers(1, 4),
)
def test_digests_agree_exactly_where_tokens_and_salt_do(
    left: list[int], right: list[int], salts: tuple[str, str], size: int
) -> None:
    chains = []
    for tokens, salt in zip((left, right), salts, strict=True):
        request = make_request(tokens, salt)
        extend_digests(request.digests, request, size, len(tokens) // size)
        chains.append(request.digests)
    for count, (a, b) in enumerate(zip(*chains, strict=False), start=1):
        same = left[: count * size] == right[: count * size] and salts[0] == salts[1]
        assert (a == b) is same
    assert len(set(chains[0])) == len(chains[0])


def test_the_chain_is_sha_256_over_parent_and_tokens() -> None:
    root = root_digest("tenant")
    assert root == hashlib.sha256(b"tenant").digest()
    wanted = hashlib.sha256(root + (5).to_bytes(8, "little") + (7).to_bytes(8, "little")).digest()
    assert block_digest(root, [5, 7]) == wanted


def test_the_longest_known_prefix_is_found() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 2)
    owner = computed(pool, cache, [1, 2, 3, 4, 5])
    assert cache.match(make_request([1, 2, 3, 4, 6, 7])) == owner.blocks[:2]
    assert cache.match(make_request([1, 2, 9, 4, 6, 7])) == owner.blocks[:1]
    assert cache.match(make_request([9, 2, 3, 4, 6, 7])) == []
    assert pool.name_of(owner.blocks[2]) is None, "a block that is not full has no name"


def test_the_last_token_is_always_left_to_compute() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 2)
    owner = computed(pool, cache, [1, 2, 3, 4])
    assert cache.match(make_request([1, 2, 3, 4])) == owner.blocks[:1]
    assert cache.match(make_request([1, 2])) == []
    assert cache.match(make_request([1, 2, 3])) == owner.blocks[:1]


def test_nothing_is_shared_across_salts() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 2)
    computed(pool, cache, [1, 2, 3, 4], salt="a")
    assert cache.match(make_request([1, 2, 3, 4, 5], salt="b")) == []
    assert cache.match(make_request([1, 2, 3, 4, 5])) == []
    assert len(cache.match(make_request([1, 2, 3, 4, 5], salt="a"))) == 2


def test_the_second_tier_fills_gaps() -> None:
    pool = BlockPool(8)
    held: dict[bytes, torch.Tensor] = {}
    cache = PrefixCache(pool, 2, held)
    owner = computed(pool, cache, [1, 2, 3, 4, 5, 6])
    held[owner.digests[1]] = torch.ones(1)
    pool.forget(owner.blocks[1])
    again = make_request([1, 2, 3, 4, 5, 6, 7])
    assert cache.match(again) == [owner.blocks[0], None, owner.blocks[2]]
    assert cache.fetch(owner.digests[1:2]) == [torch.ones(1)] and cache.fetch([]) == []
    assert cache.fetch(owner.digests[:2]) is None, "one is not to be had"
    held.clear()
    assert cache.match(again) == [owner.blocks[0]]


def test_what_is_not_to_be_trusted_is_not_found() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 2)
    owner = computed(pool, cache, [1, 2, 3, 4])
    cache.forget(owner)
    cache.publish(owner)
    assert cache.match(make_request([1, 2, 3, 4, 5])) == []
    pool.check([owner.blocks])
