import torch

from infopt.core.compression.calibration import batches, token_hash


def test_batches_hold_whole_windows_and_all_of_them() -> None:
    tokens = torch.arange(70).view(7, 10)
    parts = batches(tokens, 25)
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(parts), tokens)
    assert [len(part) for part in batches(tokens, 3)] == [1] * 7


def test_the_hash_tells_content_and_shape() -> None:
    tokens = torch.arange(12)
    assert token_hash(tokens.view(3, 4)) == token_hash(tokens.view(3, 4).clone())
    assert token_hash(tokens.view(3, 4)) != token_hash(tokens.view(4, 3))
    assert token_hash(tokens.view(3, 4)) != token_hash(tokens.view(3, 4) + 1)
