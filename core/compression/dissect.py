"""The parts of one block, found by shape and order of calls, proved by running it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infopt.core.compression.residual import put_parameter
from infopt.core.compression.trial import Run, close, made_up, states
from infopt.core.models.experts import Experts

PartName = Literal["heads", "ffn", "hidden"]


@dataclass(frozen=True, slots=True)
class Axis:
    """How the units of a part lie along one axis of a parameter (a linear layer's is [out, in]).

    Unit u holds, of each piece (start, stride, size), the `size` indices from start + u * stride.
    """

    parameter: str
    """The model's full name of it, as `load_transformers` gives the model."""
    axis: int
    pieces: tuple[tuple[int, int, int], ...]

    def indices(self, units: Sequence[int]) -> Tensor:
        """The indices of some units, rising: int64 [n]."""
        return self._of(torch.as_tensor(list(units), dtype=torch.int64)).flatten().sort().values

    def by_unit(self, units: int) -> Tensor:
        """The indices of each of the first `units`: int64 [units, unit_size]."""
        return self._of(torch.arange(units))

    def _of(self, units: Tensor) -> Tensor:
        first = units.unsqueeze(1)
        parts = [start + first * stride + torch.arange(size) for start, stride, size in self.pieces]
        return torch.cat(parts, dim=1)

    @property
    def unit_size(self) -> int:
        """Indices of one unit."""
        return sum(size for _, _, size in self.pieces)


@dataclass(frozen=True, slots=True)
class Group:
    """Units of one block that can be left out, each with its share of all `axes`."""

    units: int
    axes: tuple[Axis, ...]
    writer: str
    """The layer whose columns read the units (o_proj, down_proj): its input is their output."""
    readers: tuple[str, ...]
    """The layers that make them, reading the norm before (q, k, v; gate, up)."""


@dataclass(slots=True)
class Found:
    """What a kind of block has, by local names."""

    heads: Group | None = None
    ffn: Group | None = None
    hidden: tuple[Axis, ...] = ()
    why_not: dict[PartName, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sizes:
    hidden: int
    heads: int
    groups: int
    head_dim: int

    @property
    def queries(self) -> int:
        return self.heads // self.groups


def study(block: nn.Module, run: Run, sizes: Sizes) -> Found:
    """The parts of a filled block, by local names; its weights are put back as they were."""
    found = Found()
    if any(isinstance(module, Experts) for module in block.modules()):
        reason = "it is a mixture of experts, of which infopt leaves out whole layers only"
        found.why_not = {"heads": reason, "ffn": reason, "hidden": reason}
        return found
    hidden = states(sizes.hidden)
    sides: dict[str, int] = {}
    for parent, layers in _parents(block, run, hidden).items():
        *readers, writer = layers
        if not readers or not _fits(block, readers, writer, sizes.hidden):
            continue
        sides |= {**dict.fromkeys(readers, 1), writer: 0}
        group = _proved(block, run, hidden, _ffn_guesses(block, parent, readers, writer))
        if group is not None and found.ffn is None:
            found.ffn = group
            continue
        group = _proved(block, run, hidden, _head_guesses(block, parent, readers, writer, sizes))
        if group is not None and found.heads is None:
            found.heads = group
    if found.heads is None or found.heads.units < 2:
        one = found.heads is not None
        found.heads = None
        found.why_not["heads"] = (
            "all its query heads share one key head"
            if one
            else "no layers were found in which heads depend on nothing of each other"
        )
    if found.ffn is None:
        found.why_not["ffn"] = "no layers were found with channels that depend on no others"
    _find_stream(block, run, hidden, found, sides)
    return found


def _parents(block: nn.Module, run: Run, hidden: Tensor) -> dict[str, list[str]]:
    """The linear layers in the order of their calls, by the module that holds them."""
    order: dict[str, list[str]] = {}

    def note(_: nn.Module, __: Any, name: str) -> None:
        order.setdefault(name.rpartition(".")[0], []).append(name)

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                hook = partial(note, name=name)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        run(hidden)
    return {parent: list(dict.fromkeys(layers)) for parent, layers in order.items()}


def _fits(block: nn.Module, readers: Sequence[str], writer: str, hidden: int) -> bool:
    """Whether layers read the stream, and the one called last writes to it."""
    return _shape(block, writer)[0] == hidden and all(
        _shape(block, layer)[1] == hidden for layer in readers
    )


def _ffn_guesses(
    block: nn.Module, parent: str, readers: Sequence[str], writer: str
) -> Iterator[Group]:
    """Channels one by one: rows of each reader, or of both halves of one that makes two."""
    channels = _shape(block, writer)[1]
    rows = {_shape(block, layer)[0] for layer in readers}
    pieces: list[tuple[tuple[int, int, int], ...]] = []
    if rows == {channels}:
        pieces = [((0, 1, 1),)]
    elif rows == {2 * channels}:
        pieces = [((0, 1, 1), (channels, 1, 1)), ((0, 2, 2),)]
    for each in pieces:
        made = {layer: each for layer in readers}
        yield from _groups(block, parent, made, writer, channels, {channels: ((0, 1, 1),)})


def _head_guesses(
    block: nn.Module, parent: str, readers: Sequence[str], writer: str, sizes: Sizes
) -> Iterator[Group]:
    """KV groups: consecutive rows of each reader, or of the three parts of one that makes all."""
    groups, size, queries = sizes.groups, sizes.head_dim, sizes.queries
    columns = _shape(block, writer)[1]
    rows = [_shape(block, layer)[0] for layer in readers]
    if columns != sizes.heads * size or any(n % groups for n in rows):
        return
    made: list[dict[str, tuple[tuple[int, int, int], ...]]] = []
    if len(readers) == 1 and rows[0] == columns + 2 * groups * size:
        key, value = columns, columns + groups * size
        apart = ((0, queries * size, queries * size), (key, size, size), (value, size, size))
        together = ((0, (queries + 2) * size, (queries + 2) * size),)
        made = [{readers[0]: apart}, {readers[0]: together}]
    elif len(readers) > 1:
        parts = [((0, n // groups, n // groups),) for n in rows]
        made = [dict(zip(readers, parts, strict=True))]
    others = {sizes.heads: ((0, queries, queries),)}
    others |= {n: ((0, n // groups, n // groups),) for n in (columns, groups * size)}
    for each in made:
        yield from _groups(block, parent, each, writer, groups, others)


def _groups(
    block: nn.Module,
    parent: str,
    made: Mapping[str, tuple[tuple[int, int, int], ...]],
    writer: str,
    units: int,
    others: Mapping[int, tuple[tuple[int, int, int], ...]],
) -> Iterator[Group]:
    """The group of readers and writer; first with vectors beside them that have such a length."""
    axes = [
        Axis(f"{layer}.{leaf}", 0, pieces)
        for layer, pieces in made.items()
        for leaf, _ in block.get_submodule(layer).named_parameters()
    ]
    width = _shape(block, writer)[1] // units
    axes.append(Axis(f"{writer}.weight", 1, ((0, width, width),)))
    beside = [
        Axis(name, 0, others[len(value)])
        for name, value in _vectors(block)
        if name.startswith(f"{parent}." if parent else "") and len(value) in others
    ]
    if beside and parent:
        yield Group(units, (*axes, *beside), writer, tuple(made))
    yield Group(units, tuple(axes), writer, tuple(made))


def _proved(block: nn.Module, run: Run, hidden: Tensor, guesses: Iterator[Group]) -> Group | None:
    return next((g for g in guesses if g.units < 2 or _independent(block, run, hidden, g)), None)


def _independent(block: nn.Module, run: Run, hidden: Tensor, group: Group) -> bool:
    """Whether half of the units, kept from the writer, leave no trace whatever their weights are.

    That the writer's columns do matter shows that the trial sees them at all.
    """
    order = torch.randperm(group.units, generator=torch.Generator().manual_seed(2))
    half = sorted(order[: group.units // 2].tolist())
    kept = {a.parameter: block.get_parameter(a.parameter) for a in group.axes}
    before = run(hidden)
    writer = f"{group.writer}.weight"
    for axis in (a for a in group.axes if a.parameter == writer):
        put_parameter(block, writer, kept[writer].index_fill(1, axis.indices(half), 0.0))
    without = run(hidden)
    for axis in (a for a in group.axes if a.parameter != writer):
        own = kept[axis.parameter]
        # Other values of other sizes: what norms over several units would show.
        other = 3 * made_up(axis.parameter, own.shape, seed=3)
        rows = axis.indices(half)
        put_parameter(block, axis.parameter, own.index_copy(0, rows, other[rows]))
    changed = run(hidden)
    for name, value in kept.items():
        put_parameter(block, name, value)
    seen = not close(without, before, before - hidden)
    return seen and close(changed, without, before - hidden)


def _find_stream(
    block: nn.Module, run: Run, hidden: Tensor, found: Found, sides: Mapping[str, int]
) -> None:
    """Every axis along the stream: proved by the block's result when the stream is permuted."""
    size = hidden.shape[-1]
    inner = {a.parameter for g in (found.heads, found.ffn) if g is not None for a in g.axes}
    axes: list[Axis] = []
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        side = sides.get(name, _side(module, size))
        if side is None:
            found.why_not["hidden"] = f"it is not clear which side of {name} is the hidden width"
            return
        axes += _linear_axes(name, module, side, size)
    # A vector that is an axis of heads or channels belongs to them.
    axes += [
        Axis(n, 0, ((0, 1, 1),)) for n, v in _vectors(block) if len(v) == size and n not in inner
    ]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(4))
    expected = run(hidden)
    kept = {a.parameter: block.get_parameter(a.parameter) for a in axes}
    for axis in axes:
        own = kept[axis.parameter]
        put_parameter(block, axis.parameter, own.index_select(axis.axis, order))
    actual = run(hidden[..., order])
    for name, value in kept.items():
        put_parameter(block, name, value)
    if close(actual, expected[..., order], expected - hidden):
        found.hidden = tuple(axes)
    else:
        found.why_not["hidden"] = "its channels are not alike: permuted, they compute another thing"


def _linear_axes(name: str, module: nn.Linear, side: int, size: int) -> list[Axis]:
    if module.weight.shape[side] != size:
        return []  # it lies between others
    axes = [Axis(f"{name}.weight", side, ((0, 1, 1),))]
    if side == 0 and module.bias is not None:
        axes.append(Axis(f"{name}.bias", 0, ((0, 1, 1),)))
    return axes


def _side(module: nn.Linear, size: int) -> int | None:
    """Which side of a layer of unknown part is the stream: 0 where neither; None: both could."""
    outputs, inputs = module.weight.shape
    return None if outputs == inputs == size else int(inputs == size)


def _vectors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Vectors of weights outside of linear layers."""
    for name, value in block.named_parameters():
        owner = block.get_submodule(name.rpartition(".")[0])
        if value.ndim == 1 and not isinstance(owner, nn.Linear):
            yield name, value


def _shape(block: nn.Module, layer: str) -> tuple[int, int]:
    outputs, inputs = block.get_parameter(f"{layer}.weight").shape
    return outputs, inputs
