"""Outputs of modules that change no more, kept so that later passes need not repeat them."""

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True, slots=True)
class Tail:
    """The layer whose output a module returns: bare, or in a tuple with so many `nones` after."""

    layer: nn.Module
    nones: int | None

    def wrap(self, output: Tensor) -> Any:
        return output if self.nones is None else (output, *(None,) * self.nones)


def find_tail(output: Any, layers: Mapping[nn.Module, Tensor]) -> Tail | None:
    """Which of the layers, given with their outputs, computed what a module returned."""
    found = output[0] if isinstance(output, tuple) and output else output
    rest = output[1:] if isinstance(output, tuple) else ()
    if not isinstance(found, Tensor) or any(part is not None for part in rest):
        return None
    for layer, value in layers.items():
        if value.data_ptr() == found.data_ptr() and value.shape == found.shape:
            return Tail(layer, len(rest) if isinstance(output, tuple) else None)
    return None


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
        self._held: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._modules = ExitStack()

    def add(self, name: str, module: nn.Module) -> None:
        """From now on keep what `module`, with all that lies within it, returns."""
        replace_forward(self._modules, module, self._remembering(name, module.forward))

    def hold(self, name: str, value: Tensor, owner: str) -> None:
        """Keep the input of the layer `name` for the current batch, if there is room.

        `name` is the tail of the module `owner`: what other layers within it returned is spent.
        """
        self._held.pop((name, self.batch), None)
        spent = self._within(owner)
        freed = sum(self._kept[key].nbytes for key in spent)
        if self._used() - freed + value.nbytes <= self.limit:
            for key in spent:
                del self._kept[key]
            self._held[name, self.batch] = (value, value._version)

    def add_tail(self, name: str, module: nn.Module, tail: "Tail") -> None:
        """From now on let `module` begin at its tail, the layer `name`, where its input is held."""
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            value, version = self._held.get((name, self.batch), (None, 0))
            # What was written into since is spoiled: the version tells.
            if value is None or value._version != version:
                return compute(*args, **kwargs)
            return tail.wrap(tail.layer(value))

        replace_forward(self._modules, module, forward)

    def forget_batch(self) -> None:
        """The current batch will not be asked for again."""
        for key in [key for key in self._kept if key[1] == self.batch]:
            del self._kept[key]
        for held in [key for key in self._held if key[1] == self.batch]:
            del self._held[held]

    def clear(self) -> None:
        """Forget everything, and let the modules compute again."""
        self._modules.close()
        self._kept.clear()
        self._held.clear()

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

    def _within(self, name: str) -> list[tuple[str, int]]:
        """What is kept of the current batch of modules within the module `name`."""
        return [k for k in self._kept if k[1] == self.batch and k[0].startswith(f"{name}.")]

    def _used(self) -> int:
        kept = sum(kept.nbytes for kept in self._kept.values())
        return kept + sum(value.nbytes for value, _ in self._held.values())

    def _keep(self, key: tuple[str, int], output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        tensors = tuple(part for part in parts if isinstance(part, Tensor))
        if len(tensors) != sum(part is not None for part in parts):
            return  # something else is in it, whose changes could not be noticed
        nbytes = sum(tensor.nbytes for tensor in tensors)
        within = self._within(key[0])
        freed = sum(self._kept[k].nbytes for k in within)
        if self._used() - freed + nbytes > self.limit:
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
