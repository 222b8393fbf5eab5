"""Outputs of modules that change no more, kept so that later passes need not repeat them."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _Kept:
    output: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    nbytes: int


class Replay:
    """Modules that answer with the output they gave before for the same batch.

    At most `limit` bytes are kept; what does not fit is computed again, with the same result.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.batch = 0
        """The batch that is being computed; the caller sets it."""
        self.recording = True
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._modules = ExitStack()

    def add(self, name: str, module: nn.Module) -> None:
        """From now on keep what `module`, with all that lies within it, returns."""
        replace_forward(self._modules, module, self._remembering(name, module.forward))

    def forget_batch(self) -> None:
        """The current batch will not be asked for again."""
        for key in [key for key in self._kept if key[1] == self.batch]:
            del self._kept[key]

    def clear(self) -> None:
        """Forget everything, and let the modules compute again."""
        self._modules.close()
        self._kept.clear()

    def _remembering(self, name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, self.batch)
            kept = self._kept.get(key)
            # A model that writes into what a module returned has spoiled it: the version tells.
            if kept is not None and tuple(t._version for t in kept.tensors) == kept.versions:
                return kept.output
            output = compute(*args, **kwargs)
            if kept is None and self.recording:
                self._keep(key, output)
            return output

        return forward

    def _keep(self, key: tuple[str, int], output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        tensors = tuple(part for part in parts if isinstance(part, Tensor))
        if len(tensors) != sum(part is not None for part in parts):
            return  # something else is in it, whose changes could not be noticed
        nbytes = sum(tensor.nbytes for tensor in tensors)
        name, batch = key
        within = [k for k in self._kept if k[1] == batch and k[0].startswith(f"{name}.")]
        used = sum(kept.nbytes for k, kept in self._kept.items() if k not in within)
        if used + nbytes > self.limit:
            return
        for inner in within:
            del self._kept[inner]
        self._kept[key] = _Kept(output, tensors, tuple(t._version for t in tensors), nbytes)


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward until the stack closes."""
    former = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if former is not None:
            module.forward = former

    stack.callback(restore)
