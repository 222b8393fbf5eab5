import torch

from infopt.core.pruning.magnitude import magnitude_mask
from infopt.core.recipe.prune import parse_pattern


def test_the_smallest_of_the_layer_go_whatever_their_sign_or_row() -> None:
    weight = torch.tensor([[-4.0, 0.5, 3.0], [0.1, -0.2, 2.0]])
    mask = magnitude_mask(weight, parse_pattern("0.5"))
    assert mask.tolist() == [[True, False, True], [False, False, True]]


def test_weights_of_sixteen_bits_with_many_equals_lose_the_exact_share() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(64, 64) * 0.02).to(torch.bfloat16).float()
    assert weight.abs().unique().numel() < weight.numel() / 2, "there are equals"
    for share in (0.1, 0.5, 0.77):
        mask = magnitude_mask(weight, parse_pattern(str(share)))
        assert int((~mask).sum()) == int(share * 64 * 64)
        assert weight.abs()[~mask].max() <= weight.abs()[mask].min()
