"""Scales that move between a layer's input columns and what feeds it, the function unchanged.

AWQ and SmoothQuant divide a norm, or a linear layer, by a factor a channel, and multiply the
columns of the layers behind it. Which modules allow that is found by running the block, not by
their names or classes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infopt.core.compression.finite import all_finite
from infopt.core.compression.norms import gain_offset
from infopt.core.compression.targets import Target
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError

_TOLERANCE = 1e-3
"""Of the change that the source alone would make: how much may be left with its layers."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A norm or linear layer `source` whose output reaches `layers` and nothing else.

    Full names. Dividing its channels by any positive factors and multiplying the layers' columns
    by the same changes nothing of what the block computes. Each run of `width` channels (None: all
    of them) reaches `repeat` runs of columns, one after the other: as values do under grouped
    queries, where the heads of a group read the same ones.
    """

    source: str
    layers: tuple[str, ...]
    kind: Literal["norm", "linear"]
    repeat: int = 1
    width: int | None = None

    def channels(self, columns: int) -> Tensor:
        """The channel of the source that reaches each of the layers' columns, int64 [columns]."""
        runs = torch.arange(columns // self.repeat).reshape(-1, 1, self.width or columns)
        return runs.expand(-1, self.repeat, -1).flatten()


@dataclass(slots=True)
class _Seen:
    """What a run of the probe showed; the tensors are held so that none takes another's place."""

    norms: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Of the targets, in order of their calls."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Of the modules that hold the targets."""


@torch.no_grad()
def find_pairs(walk: Walk, index: int, targets: Sequence[Target]) -> list[Pair]:
    """The pairs of the loaded block `index`, in order of their layers' calls.

    Norms before all targets that share an input; linear layers before one of the same parent (v
    before o, of grouped queries too; up before down). Every candidate is tried on the probe: where
    factors on source and layers do not cancel, or the probe cannot tell, it is no pair. Call it
    before any `settle`.
    """
    assert index == walk.position
    seen = _watch(walk, targets)
    order = list(seen.inputs)
    found = [
        pair
        for source, output in seen.norms.items()
        if (layers := tuple(n for n in order if _same(seen.inputs[n], output)))
        and _cancels(walk, pair := Pair(source, layers, "norm"), _run_block(walk))
    ]
    for number, layer in enumerate(order):
        # What was called last is the likeliest: up after gate, v after q and k.
        for source in reversed(order[:number]):
            if _parent(source) != _parent(layer) or _same(seen.inputs[source], seen.inputs[layer]):
                continue
            run = _run(walk, seen, layer)
            likely = _candidate(walk, source, layer, run)
            if likely is not None and _cancels(walk, likely, run):
                found.append(likely)
                break
    return sorted(found, key=lambda pair: order.index(pair.layers[0]))


def _candidate(walk: Walk, source: str, layer: str, run: Callable[[], Tensor]) -> Pair | None:
    """The pair that two layers may be by their sizes and by where the source's values arrive."""
    outputs, inputs = walk.layer(source).out_features, walk.layer(layer).in_features
    if outputs == inputs:
        return Pair(source, (layer,), "linear")
    if inputs % outputs:
        return None
    repeat = inputs // outputs
    columns = _reached(walk, source, layer, run)
    width = columns[1] - columns[0] if len(columns) == repeat else 0
    if width == 0 or outputs % width or columns != [i * width for i in range(repeat)]:
        return None
    return Pair(source, (layer,), "linear", repeat, width)


def _reached(walk: Walk, source: str, layer: str, run: Callable[[], Tensor]) -> list[int]:
    """The columns of the layer whose inputs change with the first channel of the source."""
    seen: list[dict[str, Tensor]] = []
    first = torch.ones(walk.layer(source).out_features, device=walk.device)
    first[0] = 2.0
    for factors in (torch.ones_like(first), first):
        with ExitStack() as hooks:
            seen.append({})
            hooks.enter_context(_divide_output(walk.layer(source), factors))
            hooks.enter_context(_note_input(walk.layer(layer), layer, seen[-1]))
            run()
    before, after = (found[layer].reshape(-1, found[layer].shape[-1]) for found in seen)
    return (before != after).any(dim=0).nonzero().flatten().tolist()


@torch.no_grad()
def scale_pair(walk: Walk, pair: Pair, scales: Tensor) -> tuple[str, ...]:
    """Divide the source by `scales` [C] and multiply the layers' columns; in place, in float32.

    Returns the full names of the parameters that changed. Raises NumericsError, with nothing
    changed, where scales are not positive or a result does not fit the parameters' dtype.
    """
    factors = scales.to(walk.device, torch.float32)
    if not bool((torch.isfinite(factors) & (factors > 0)).all()):
        raise NumericsError(f"the scales between {pair.source} and {pair.layers[0]} are not finite")
    changed = dict(_scaled_source(walk, pair, factors))
    columns = factors[pair.channels(len(factors) * pair.repeat)]
    for layer in pair.layers:
        changed[f"{layer}.weight"] = walk.layer(layer).weight.float() * columns
    stored = {name: walk.model.get_parameter(name) for name in changed}
    values = {name: value.to(stored[name].dtype) for name, value in changed.items()}
    for name, value in values.items():
        if not all_finite(value):
            raise NumericsError(
                f"{name}, scaled, does not fit into {str(value.dtype).removeprefix('torch.')}",
                "try --dtype float32",
            )
    for name, value in values.items():
        stored[name].copy_(value)
    return tuple(values)


def _scaled_source(walk: Walk, pair: Pair, factors: Tensor) -> Iterator[tuple[str, Tensor]]:
    source = walk.model.get_submodule(pair.source)
    weight = source.get_parameter("weight").float()
    match pair.kind:
        case "norm":
            offset = gain_offset(source)
            assert offset is not None, "find_pairs takes no other norm"
            yield f"{pair.source}.weight", (weight + offset) / factors - offset
        case "linear":
            yield f"{pair.source}.weight", weight / factors.unsqueeze(1)
    bias = source._parameters.get("bias")
    if bias is not None:
        yield f"{pair.source}.bias", bias.float() / factors


def _watch(walk: Walk, targets: Sequence[Target]) -> _Seen:
    seen = _Seen()
    name = walk.names[walk.position]
    with ExitStack() as hooks:
        for local, module in walk.block.named_modules():
            if not isinstance(module, nn.Linear) and gain_offset(module) is not None:
                hooks.enter_context(_note_output(module, f"{name}.{local}", seen.norms))
        for target in targets:
            hooks.enter_context(_note_input(walk.layer(target.name), target.name, seen.inputs))
        for parent in {_parent(target.name) for target in targets} - {name}:
            hooks.enter_context(_note_call(walk.model.get_submodule(parent), parent, seen.calls))
        walk.run_probe()
    return seen


def _note_output(module: nn.Module, name: str, noted: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        noted.setdefault(name, output)

    return module.register_forward_hook(hook)


def _note_input(module: nn.Module, name: str, noted: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        noted.setdefault(name, args[0])

    return module.register_forward_pre_hook(hook)


def _note_call(module: nn.Module, name: str, noted: dict[str, Any]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted.setdefault(name, (args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same values in memory, perhaps in another shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _run_block(walk: Walk) -> Callable[[], Tensor]:
    return lambda: walk.run_probe().float()


def _run(walk: Walk, seen: _Seen, layer: str) -> Callable[[], Tensor]:
    """Run the module around a layer as the probe did: cheaper than the block, and it sees more.

    An expert's output, for one, is seen here even where the router gave it no weight.
    """
    parent = _parent(layer)
    if parent not in seen.calls:
        return _run_block(walk)
    args, kwargs = seen.calls[parent]
    module = walk.model.get_submodule(parent)
    return lambda: torch.cat([t.float().flatten() for t in _tensors(module(*args, **kwargs))])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _cancels(walk: Walk, pair: Pair, run: Callable[[], Tensor]) -> bool:
    """Whether factors on the source's output and on the layers' inputs cancel out.

    Powers of two round nowhere, so a true pair gives the same bits. That the factors on the source
    alone do change the output shows that the probe sees them at all.
    """
    source = walk.model.get_submodule(pair.source)
    columns = pair.channels(walk.layer(pair.layers[0]).in_features)
    count = len(columns) // pair.repeat
    powers = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(0))
    factors = (2.0**powers).to(walk.device)
    expected = run()
    with ExitStack() as hooks:
        hooks.enter_context(_divide_output(source, factors))
        alone = float((run() - expected).norm())
        for layer in pair.layers:
            hooks.enter_context(_multiply_input(walk.layer(layer), factors[columns]))
        left = float((run() - expected).norm())
    return alone > 0 and left <= _TOLERANCE * alone  # false for NaN


def _divide_output(module: nn.Module, factors: Tensor) -> Any:
    return module.register_forward_hook(lambda _, __, output: output / factors.to(output.dtype))


def _multiply_input(module: nn.Module, factors: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * factors.to(args[0].dtype), *args[1:])

    return module.register_forward_pre_hook(hook)
