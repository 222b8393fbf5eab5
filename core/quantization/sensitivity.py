"""What each unit of layers costs when it alone is quantized: the KL from the original model.

The whole model stays in memory, with what every block is given for the text: a unit of one block
is judged by running only the blocks from there on.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.calibration import batches
from infopt.core.compression.targets import TargetBlock
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, ResourceError, UsageError
from infopt.core.formats.number import IntegerFormat
from infopt.core.hardware.probe import probe
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.quantization.nearest import group_grids, quantize_nearest
from infopt.core.reports.quantize import SensitivityRow

_BATCH_TOKENS = 512
"""More at once are hardly faster, and their logits would take the memory."""
_PROBE_TOKENS = 8
_CHUNK = 1 << 19
"""Logits that are compared at once: few enough for a cache."""
_SLACK = 1.2
"""What the allocator holds over what lives in it at once."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that an engine fuses, and that must be quantized alike."""

    name: str
    """'model.layers.0.self_attn.{q,k,v}_proj' for several layers; a layer alone has its own."""
    layers: tuple[str, ...]
    parameters: int


def units(
    model: nn.Module, block: TargetBlock, groups: Sequence[tuple[str, ...]]
) -> tuple[Unit, ...]:
    """The targets of a block by what engines fuse, in order of definition.

    `groups` are the targets by the input that they share (`Walk.input_groups`). Those of one
    module that share an input are tied (q/k/v, gate/up), and all within a list of modules that
    are alike (experts).
    """
    keys: dict[str, tuple[str, int]] = {}
    for number, group in enumerate(groups):
        for name in group:
            experts = _experts(model, block.name, name)
            keys[name] = (f"{experts}.*", -1) if experts else (name.rpartition(".")[0], number)
    members: dict[tuple[str, int], list[str]] = {}
    for target in block.targets:
        members.setdefault(keys[target.name], []).append(target.name)
    sizes = {target.name: target.outputs * target.inputs for target in block.targets}
    return tuple(
        Unit(
            parent if number < 0 else _shared_name(names),
            tuple(names),
            sum(sizes[name] for name in names),
        )
        for (parent, number), names in members.items()
    )


def measure(
    artifact: Artifact,
    blocks: Sequence[TargetBlock],
    tokens: Tensor,
    bits: Sequence[int],
    form: Callable[[int], IntegerFormat],
    *,
    mse: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    known: Sequence[SensitivityRow] = (),
    found: Callable[[SensitivityRow], None] | None = None,
    progress: ProgressCallback = silent,
) -> tuple[SensitivityRow, ...]:
    """KL and NLL on `tokens` (int64 [windows, length]) of every unit rounded to each of `bits`.

    KL(original || with that unit alone quantized) of the next-token distributions, nats a token;
    grids of least squared error with `mse`. `form` makes the number format of a width; a group
    size must divide every layer. Rows go to `found` as they come, and those that are `known` are
    not measured again. In bfloat16 the noise of the activations hides what 8 bits cost.
    Raises ResourceError where the model does not fit into memory, before any of it is read, and
    NumericsError naming the unit or block whose values are not finite.
    """
    widths = sorted(set(bits))
    if not widths:
        raise UsageError("there are no widths to measure")
    walk = Walk(artifact, tokens[:1, :_PROBE_TOKENS], batches(tokens, _BATCH_TOKENS), dtype, device)
    _check_memory(walk, blocks, tokens)
    original = _run_original(walk, blocks, progress)
    rows = {(row.layers, row.bits): row for row in known}
    order = [(part, unit, width) for part, unit in original.units for width in widths]
    resumed = sum((unit.layers, width) in rows for _, unit, width in order)
    done = resumed
    for position, unit, width in order:
        if (unit.layers, width) in rows:
            continue
        progress(Progress("measuring sensitivity", done, len(order), unit.name, resumed))
        with _rounded(walk, unit, form(width), mse=mse):
            kl, delta = _effect(original, position)
        if not (math.isfinite(kl) and math.isfinite(delta)):
            raise NumericsError(
                f"with {unit.name} in {width} bits the model predicts values that are not finite",
                f"leave the width {width} out, or the layers: --ignore '{unit.layers[0]}'",
            )
        row = SensitivityRow(
            unit=unit.name,
            layers=unit.layers,
            parameters=unit.parameters,
            bits=width,
            kl=kl,
            delta_nll=delta,
        )
        rows[unit.layers, width] = row
        done += 1
        if found is not None:
            found(row)
    return tuple(rows[unit.layers, width] for _, unit, width in order)


def needed_memory(
    model: PreTrainedModel, blocks: Sequence[TargetBlock], tokens: int, dtype: torch.dtype
) -> int:
    """Bytes that `measure` takes for so many tokens, besides those the process has already.

    The weights, each block's inputs, the original's log-probabilities in float32, and what one
    comparison and the rounding of the largest block work with.
    """
    embedding: Tensor = model.get_input_embeddings().weight
    vocabulary, width = embedding.shape
    weights: int = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    states = (len(blocks) + 2) * tokens * width * dtype.itemsize
    expected = tokens * vocabulary * 4
    logits = min(tokens, _BATCH_TOKENS) * vocabulary * (dtype.itemsize + 4)
    rounding = 24 * max((t.outputs * t.inputs for b in blocks for t in b.targets), default=0)
    return weights + int(_SLACK * (states + expected + logits + rounding))


def difference(expected: Tensor, logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Sums of KL(expected || softmax(logits)) over the rows, and of the rise of the NLL.

    expected: log-probabilities, float32 [T, V]; logits [T, V] of any dtype; targets int64 [T], -1
    where no token follows. The KL is the sum of p (log p - log q) - p + q: as both sum to one,
    the same, but rounded normalizers cancel, and with them what would hide a small KL.
    """
    kl = rise = 0.0
    step = max(1, _CHUNK // logits.shape[1])
    for begin in range(0, len(logits), step):
        rows = slice(begin, begin + step)
        log_p, log_q = expected[rows], logits[rows].float().log_softmax(1)
        p, q = log_p.exp(), log_q.exp()
        # A token of probability 0 adds only q: without the mask it would add 0 * inf.
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0) + (q - p)
        kl += float(terms.sum(dtype=torch.float64))
        chosen = targets[rows].clamp(min=0).unsqueeze(1)
        gap = (log_p.gather(1, chosen) - log_q.gather(1, chosen)).squeeze(1)
        rise += float(gap[targets[rows] >= 0].sum(dtype=torch.float64))
    return kl, rise


@dataclass(frozen=True, slots=True)
class _Original:
    """The unchanged model in memory, and what it makes of the text."""

    walk: Walk
    units: tuple[tuple[int, Unit], ...]
    """Each with the number of its block."""
    states: tuple[tuple[Tensor, ...], ...]
    """What each block is given, batch by batch."""
    expected: tuple[Tensor, ...]
    """Log-probabilities by batch, float32 [tokens, vocabulary]."""


def _run_original(
    walk: Walk, blocks: Sequence[TargetBlock], progress: ProgressCallback
) -> _Original:
    walk.start()
    by_name = {block.name: block for block in blocks}
    found: list[tuple[int, Unit]] = []
    states = []
    for position, name in enumerate(walk.names):
        progress(Progress("running the original", position, len(walk.names)))
        walk.load()
        if (block := by_name.get(name)) is not None and block.targets:
            groups = walk.input_groups(block.targets)
            found += [(position, unit) for unit in units(walk.model, block, groups)]
        states.append(tuple(walk.hidden[1:]))
        walk.advance(keep=True)
    walk.fill_outside()
    expected = []
    for index, hidden in enumerate(walk.hidden[1:], 1):
        logits = walk.logits(index, hidden).flatten(0, 1)
        expected.append(logits.float().log_softmax(1))
        if bool(expected[-1].isnan().any()):
            raise NumericsError(
                f"the logits of {walk.artifact.name} are not finite in "
                f"{str(walk.dtype).removeprefix('torch.')}",
                "try --dtype float32; if it is so already, the weights are broken",
            )
    return _Original(walk, tuple(found), tuple(states), tuple(expected))


def _effect(original: _Original, position: int) -> tuple[float, float]:
    """KL and rise of the NLL, nats a token, as the block `position` is now."""
    walk = original.walk
    kl = rise = 0.0
    scored = 0
    for index, given in enumerate(original.states[position], 1):
        hidden = given.clone()  # a model may write into what it is given
        for later in range(position, len(walk.names)):
            hidden = walk.through(later, index, hidden)
        logits = walk.logits(index, hidden).flatten(0, 1)
        following = walk.tokens[index].roll(-1, dims=1)
        following[:, -1] = -1
        targets = following.flatten().to(logits.device)
        sums = difference(original.expected[index - 1], logits, targets)
        kl, rise = kl + sums[0], rise + sums[1]
        scored += int((targets >= 0).sum())
    tokens = sum(len(one) for one in original.expected)
    return kl / tokens, rise / max(1, scored)


@contextmanager
def _rounded(walk: Walk, unit: Unit, form: IntegerFormat, *, mse: bool) -> Iterator[None]:
    """The unit's weights rounded to the nearest codes; afterwards they are what they were."""
    layers = [walk.layer(name) for name in unit.layers]
    kept = [layer.weight.data for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            nearest = quantize_nearest(weight, form, group_grids(weight, form, mse=mse))
            layer.weight.data = nearest.dequantize(weight.dtype)
        yield
    except NumericsError as error:
        raise NumericsError(f"{unit.name}: {error.message}", error.hint) from error
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight


def _check_memory(walk: Walk, blocks: Sequence[TargetBlock], tokens: Tensor) -> None:
    needed = needed_memory(walk.model, blocks, tokens.numel(), walk.dtype)
    if walk.device.type == "cuda":
        free = torch.cuda.mem_get_info(walk.device)[0]
    else:
        free = probe().memory_available_bytes
    if needed > free:
        raise ResourceError(
            f"measuring the sensitivity of {walk.artifact.name} on {tokens.numel()} tokens keeps "
            f"the whole model in memory: {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} are free",
            "take fewer tokens, --dtype bfloat16, or a machine with more memory",
        )


def _experts(model: nn.Module, block: str, name: str) -> str | None:
    """The outermost list of modules that are alike, within the block and around a layer."""
    parts = name.removeprefix(f"{block}.").split(".")
    for end in range(1, len(parts)):
        path = ".".join([block, *parts[:end]])
        children = dict(model.get_submodule(path).named_children())
        if len(children) < 2 or not all(child.isdigit() for child in children):
            continue
        if len({_shape(child) for child in children.values()}) == 1:
            # A list for each projection of the experts: what holds these lists is tied.
            return path.rpartition(".")[0] if end == len(parts) - 1 and end > 1 else path
    return None


def _shape(module: nn.Module) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (name, part.in_features, part.out_features)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    )


def _shared_name(names: Sequence[str]) -> str:
    """The names of layers of one module as one: what they share of their last parts, once."""
    if len(names) == 1:
        return names[0]
    parent = names[0].rpartition(".")[0]
    leaves = [name.rpartition(".")[2].split("_") for name in names]
    head = tail = 0
    shortest = min(len(leaf) for leaf in leaves) - 1
    while head < shortest and len({leaf[head] for leaf in leaves}) == 1:
        head += 1
    while tail < shortest - head and len({leaf[-1 - tail] for leaf in leaves}) == 1:
        tail += 1
    middles = ",".join("_".join(leaf[head : len(leaf) - tail]) for leaf in leaves)
    before = "".join(f"{part}_" for part in leaves[0][:head])
    after = "".join(f"_{part}" for part in leaves[0][len(leaves[0]) - tail :])
    return f"{parent}.{before}{{{middles}}}{after}"
