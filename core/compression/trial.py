"""A decoder on made-up weights and a few tokens, run block by block, to try out what it computes.

Nothing of the model's own weights is read, so a trial costs one block's memory and shows what the
architecture does, not what one checkpoint happens to do.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.core.compression.replay import replace_forward
from infopt.core.compression.residual import put_parameter
from infopt.core.models.hf import blocks, release

TOKENS = 16
TOLERANCE = 1e-3
"""Largest difference that counts as none, as a share of what is added; float32 leaves ~1e-6."""

Run = Callable[[Tensor], Tensor]
"""Runs a block on hidden states [1, TOKENS, size]."""


class _Enough(Exception):
    """What was wanted of a forward pass has been seen."""


class Trial:
    """A skeleton in float32 whose ends are made up; its blocks are filled by who runs them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inside = blocks(model)[0][0].rpartition(".")[0] + "."
        for name, parameter in self.ends().items():
            owner = model.get_submodule(name.rpartition(".")[0])
            wordy = owner in (model.get_input_embeddings(), model.get_output_embeddings())
            # A vocabulary of a few tokens is enough.
            shape = (TOKENS if wordy else parameter.shape[0], *parameter.shape[1:])
            put_parameter(model, name, made_up(name, torch.Size(shape)))
        self._tuples = self._first_returns_tuple()
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.run_around(self._calls)

    def ends(self) -> dict[str, nn.Parameter]:
        """The parameters around the blocks, tied ones under each of their names."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(self.inside)
        }

    def run_around(self, calls: list[Any] | None = None) -> Tensor:
        """The logits where every block hands its input on; notes in `calls` how each is called."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if calls is not None:
                calls.append((args, kwargs))
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, None, None) if self._tuples else hidden

        with ExitStack() as stack:
            for _, block in blocks(self.model):
                replace_forward(stack, block, forward)
            output = self.model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
        logits: Tensor = output.logits
        return logits

    def embedded(self) -> Tensor:
        """What the first block is given, as the ends are now: [1, TOKENS, size]."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.run_around(calls)
        args, kwargs = calls[0]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    def run_of(self, index: int) -> Run:
        """How the block `index` is run, as the model would."""
        args, kwargs = self._calls[index]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        block = blocks(self.model)[index][1]

        def run(hidden: Tensor) -> Tensor:
            output = block(hidden, *args[1:], **rest)
            result: Tensor = output[0] if self._tuples else output
            return result

        return run

    def _first_returns_tuple(self) -> bool:
        _, first = blocks(self.model)[0]
        fill(first)
        seen: list[object] = []

        def hook(_: nn.Module, __: Any, output: object) -> None:
            seen.append(output)
            raise _Enough

        with ExitStack() as stack:
            stack.callback(first.register_forward_hook(hook).remove)
            stack.enter_context(suppress(_Enough))
            self.model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
        release(first)
        return isinstance(seen[0], tuple)


def made_up(name: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """Values for a parameter, none of them special; the same for the same name, shape and seed."""
    generator = torch.Generator().manual_seed((crc32(name.encode()) << 8) + seed)
    value = torch.randn(shape, generator=generator)
    return 1 + 0.2 * value if len(shape) == 1 else value / shape[-1] ** 0.5


def fill(part: nn.Module) -> None:
    """Make up every parameter of a block."""
    for name, parameter in list(part.named_parameters()):
        put_parameter(part, name, made_up(name, parameter.shape))


def states(size: int) -> Tensor:
    """Hidden states to run a block on: [1, TOKENS, size]."""
    return torch.randn(1, TOKENS, size, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether two results are the same but for rounding; false for NaN."""
    return bool((actual - expected).norm() <= TOLERANCE * scale.norm())
