import torch
from hypothesis import given
from hypothesis import strategies as st

from infopt.core.runtime.prefix_store import PrefixStore


def content(size: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.float32)


def test_the_least_recently_used_goes_first() -> None:
    store = PrefixStore(limit=3 * 8)
    for name in (b"a", b"b", b"c"):
        store.put(name, content(2))
    store.get(b"a")
    store.put(b"d", content(2))
    assert b"b" not in store and all(name in store for name in (b"a", b"c", b"d"))
    assert store.nbytes == 24 and len(store) == 3


def test_what_is_larger_than_the_limit_pushes_nothing_out() -> None:
    store = PrefixStore(limit=8)
    store.put(b"a", content(2, 5.0))
    store.put(b"b", content(3))
    kept = store.get(b"a")
    assert b"b" not in store and kept is not None and float(kept[0]) == 5.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40), st.integers(0, 60))
def test_bytes_are_counted_and_kept_to(puts: list[tuple[int, int]], limit: int) -> None:
    store = PrefixStore(limit)
    for name, size in puts:
        store.put(bytes([name]), content(size, float(name)))
        held = [found for n in range(6) if (found := store.get(bytes([n]))) is not None]
        assert store.nbytes == sum(tensor.nbytes for tensor in held) <= limit
        assert len(store) == len(held) == sum(bytes([n]) in store for n in range(6))
