import torch

from infopt.kernels.attention.cache import (
    copy_blocks,
    keys_of,
    new_cache,
    read_blocks,
    token_bytes,
    values_of,
    write_blocks,
    write_kv,
)


def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    cache = new_cache(4, 3, 2, 5, torch.float32, torch.device("cpu")).fill_(torch.nan)
    key_value = torch.randn(3, 4, 5)
    slots = torch.tensor([11, 0, 4])
    write_kv(cache, key_value, slots)
    keys, values = keys_of(cache).reshape(12, 2, 5), values_of(cache).reshape(12, 2, 5)
    assert torch.equal(keys[slots], key_value[:, :2])
    assert torch.equal(values[slots], key_value[:, 2:])
    assert int(torch.isfinite(cache).sum()) == key_value.numel()


def test_a_slice_of_a_wider_tensor_can_be_written() -> None:
    cache = new_cache(2, 2, 1, 4, torch.float32, torch.device("cpu"))
    qkv = torch.randn(2, 5, 4)
    write_kv(cache, qkv[:, 3:], torch.tensor([1, 2]))
    assert torch.equal(keys_of(cache).reshape(4, 4)[1:3], qkv[:, 3])


def test_bytes_of_a_token_are_those_of_the_cache() -> None:
    cache = new_cache(4, 3, 2, 5, torch.bfloat16, torch.device("cpu"))
    assert cache.nbytes == 12 * token_bytes(2, 5, torch.bfloat16)


def test_blocks_are_copied_whole_and_nothing_else_changes() -> None:
    cache = new_cache(6, 3, 2, 5, torch.float32, torch.device("cpu")).normal_()
    before = cache.clone()
    copy_blocks(cache, torch.tensor([1, 1, 5]), torch.tensor([0, 4, 2]))
    wanted = before.clone()
    wanted[0], wanted[4], wanted[2] = before[1], before[1], before[5]
    assert torch.equal(cache, wanted)


def test_blocks_read_are_written_back_as_they_were() -> None:
    cache = new_cache(6, 3, 2, 5, torch.bfloat16, torch.device("cpu")).normal_()
    before = cache.clone()
    held = read_blocks(cache, torch.tensor([4, 1]))
    cache.zero_()
    write_blocks(cache, torch.tensor([0, 5]), held)
    assert torch.equal(cache[0], before[4]) and torch.equal(cache[5], before[1])
    assert int(cache[1:5].count_nonzero()) == 0
