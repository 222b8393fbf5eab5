from contextlib import ExitStack

import torch
from torch import Tensor, nn

from infopt.core.compression.replay import Replay, Tail, replace_forward


class Counting(nn.Module):
    """Returns a tuple, as attention modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.calls = 0

    def forward(self, inputs: Tensor, *, factor: float = 1.0) -> tuple[Tensor, None]:
        self.calls += 1
        return self.inner(inputs) * factor, None


@torch.no_grad()
def test_each_batch_is_computed_once() -> None:
    module, replay = Counting(), Replay(10**6)
    replay.add("m", module)
    inputs = [torch.ones(2, 4), torch.zeros(2, 4)]
    for _ in range(3):
        for replay.batch, value in enumerate(inputs):
            assert torch.equal(module(value, factor=2.0)[0], module.inner(value) * 2)
    assert module.calls == 2
    replay.batch = 0
    replay.forget_batch()
    module(inputs[0])
    assert module.calls == 3
    replay.clear()
    module(inputs[0])
    assert module.calls == 4, "after clear it computes as ever"


@torch.no_grad()
def test_the_outer_output_replaces_the_inner() -> None:
    module = Counting()
    # Room for one output of 8 floats, not for two.
    replay = Replay(40)
    replay.add("m.inner", module.inner)
    module(torch.ones(2, 4))
    replay.add("m", module)
    for _ in range(3):
        module(torch.ones(2, 4))
    assert module.calls == 2


@torch.no_grad()
def test_beyond_the_limit_it_computes_again() -> None:
    module, replay = Counting(), Replay(31)
    replay.add("m", module)
    for _ in range(3):
        module(torch.ones(2, 4))
    assert module.calls == 3


def test_a_replaced_forward_comes_back_layer_by_layer() -> None:
    module = nn.Identity()
    with ExitStack() as outer:
        replace_forward(outer, module, lambda _: 1)
        with ExitStack() as inner:
            replace_forward(inner, module, lambda _: 2)
            assert module(0) == 2
        assert module(0) == 1
    assert module(0) == 0


@torch.no_grad()
def test_what_a_held_tail_makes_needless_gives_its_room() -> None:
    """Room for one tensor: the input of the tail takes the place of the output before it."""
    layer, value = nn.Linear(4, 4, bias=False), torch.ones(2, 4)
    replay = Replay(value.nbytes)
    replay.add("m.first", layer)
    expected = layer(value)
    replay.hold("m.last", value, "m")
    layer.weight.mul_(2)
    assert torch.equal(layer(value), expected * 2), "no longer kept: computed anew"
    replay.hold("n.last", torch.ones(1, 4), "n")
    module = Counting()
    replay.add_tail("n.last", module, Tail(module.inner, 1))
    module(value)
    assert module.calls == 1, "there was no room for the tail of another module"
