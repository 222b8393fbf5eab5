import torch

from infopt.kernels.attention.cache import keys_of, new_cache, token_bytes, values_of, write_kv


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
