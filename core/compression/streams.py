"""Find a decoder's residual stream by running it: on made-up weights, a few tokens, block by block.

Who reads a norm is told by the rows that reach it, who writes by shape, the way of the values by
trial; then the whole is proved: every kind of block, rotated, must compute the rotated result. No
names and no weights of the model are looked at, so that an unfit one is refused at once.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.norms import gain_offset
from infopt.core.compression.replay import replace_forward
from infopt.core.compression.residual import (
    Residual,
    Turn,
    Values,
    put_parameter,
    rotate_parameters,
    turn_columns,
    turn_heads,
)
from infopt.core.errors import UnsupportedError
from infopt.core.formats.hadamard import rotation
from infopt.core.models.hf import blocks, release, skeleton

_TOKENS = 16
_TOLERANCE = 1e-3
"""Largest difference after a rotation, as a share of what is added; float32 leaves about 1e-6."""

_Run = Callable[[Tensor], Tensor]
"""Runs a block on hidden states [1, tokens, size]."""


class _Unfit(Exception):
    """Why a model cannot be rotated."""


class _Enough(Exception):
    """What was wanted of a forward pass has been seen."""


@dataclass(slots=True)
class _Seen:
    """What a run of a block showed, by local names: of modules with a matrix, and of norms."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    normed: dict[str, Tensor] = field(default_factory=dict)
    """What the norms as wide as the stream return."""
    unnormed: dict[str, Tensor] = field(default_factory=dict)
    """What they are given."""


@torch.no_grad()
def find_residual(artifact: Artifact) -> Residual:
    """The residual stream of a decoder with an RMSNorm before the layers of each block.

    Raises UnsupportedError with the reason where a rotation of the stream would change what the
    model computes. One block of made-up weights is in memory at a time.
    """
    model = skeleton(artifact, torch.float32)
    found: list[Residual] = []
    known: dict[tuple[tuple[str, torch.Size], ...], Residual] = {}
    try:
        ends = _find_ends(model)
        runs = _prove_ends(model, ends)
        for (name, block), run in zip(blocks(model), runs, strict=True):
            # Blocks with the same parameters are of one kind.
            kind = tuple((local, p.shape) for local, p in block.named_parameters())
            if kind not in known:
                _fill(block)
                known[kind] = _study(model, name, block, run, ends.size)
                release(block)
            found.append(known[kind].within(name))
    except _Unfit as fault:
        raise UnsupportedError(
            f"{artifact.name} cannot be rotated: {fault}",
            "take another method for it, such as gptq or smoothquant",
        ) from None
    return ends.joined(found)


def _find_ends(model: PreTrainedModel) -> Residual:
    """Embedding, last norm and head; nothing else with weights may lie around the blocks."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _Unfit("it has no plain embedding and head")
    size = embedding.weight.shape[1]
    inside = blocks(model)[0][0].rpartition(".")[0] + "."
    others = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside)
    }
    others = {name: part for name, part in others.items() if part not in (embedding, head)}
    norms = {
        names[part]: _offset(names[part], part)
        for part in others.values()
        if _width(part) == size and gain_offset(part) is not None
    }
    for name, part in others.items():
        if names[part] not in norms:
            raise _Unfit(f"{name} acts on the residual stream besides the embedding")
    if len(norms) != 1:
        raise _Unfit(f"{len(norms) or 'no'} norms lie between the last block and the head")
    return Residual(
        size=size,
        embeddings=frozenset({names[embedding]}),
        heads=frozenset({names[head]}),
        norms=norms,
        readers={names[head]: next(iter(norms))},
        writers=frozenset(),
        values={},
    )


def _prove_ends(model: PreTrainedModel, ends: Residual) -> list[_Run]:
    """How each block is run; on the way, that the model around the blocks bears a rotation."""
    for name in (*ends.embeddings, *ends.norms, *ends.readers):
        # A vocabulary of a few tokens is enough.
        _fill(model.get_submodule(name), rows=None if name in ends.norms else _TOKENS)
    _, first = blocks(model)[0]
    _fill(first)
    tuples = isinstance(_run_first(model), tuple)
    release(first)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    expected = _run_around(model, tuples, calls)
    rotate_parameters(Turn(ends, rotation(ends.size, seed=0), {}), model)
    if not _close(_run_around(model, tuples, []), expected, expected):
        raise _Unfit("more than a norm lies between the embedding, the blocks and the head")

    def bound(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Run:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}

        def run(hidden: Tensor) -> Tensor:
            output = block(hidden, *args[1:], **rest)
            result: Tensor = output[0] if tuples else output
            return result

        return run

    return [bound(block, *call) for (_, block), call in zip(blocks(model), calls, strict=True)]


def _run_first(model: PreTrainedModel) -> object:
    """What the first block returns."""
    _, first = blocks(model)[0]
    seen: list[object] = []

    def hook(_: nn.Module, __: Any, output: object) -> None:
        seen.append(output)
        raise _Enough

    with ExitStack() as stack:
        stack.callback(first.register_forward_hook(hook).remove)
        stack.enter_context(suppress(_Enough))
        model(input_ids=torch.arange(_TOKENS)[None], use_cache=False)
    return seen[0]


def _run_around(model: PreTrainedModel, tuples: bool, calls: list[Any]) -> Tensor:
    """The logits where every block hands its input on; notes how the blocks are called."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None, None) if tuples else hidden

    with ExitStack() as stack:
        for _, block in blocks(model):
            replace_forward(stack, block, forward)
        output = model(input_ids=torch.arange(_TOKENS)[None], use_cache=False)
    logits: Tensor = output.logits
    return logits


def _study(model: PreTrainedModel, name: str, block: nn.Module, run: _Run, size: int) -> Residual:
    """The roles in a block by local names, proved by a rotation of the block, which it changes."""
    for local, parameter in block.named_parameters():
        if parameter.ndim > 2 and size in parameter.shape[1:]:
            raise _Unfit(f"{name}.{local} holds the weights of several layers in one tensor")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, _TOKENS, size, generator=generator)
    seen = _watch(block, run, hidden, size)
    readers = {
        layer: norm
        for layer, rows in seen.inputs.items()
        for norm, output in seen.normed.items()
        if _rows_of(rows, output)
    }
    if not readers:
        raise _Unfit(f"no norm stands right before the layers of {name}")
    norms = {
        n: _offset(f"{name}.{n}", block.get_submodule(n)) for n in dict.fromkeys(readers.values())
    }
    writers = _find_writers(block, run, hidden, [n for n in seen.inputs if n not in readers])
    for norm, rows in seen.unnormed.items():
        for layer in sorted(writers):
            if norm not in norms and _rows_of(rows, seen.outputs[layer]):
                raise _Unfit(f"{name}.{norm} normalizes what {layer} writes to the residual stream")
    uncalled = [
        layer
        for layer, module in block.named_modules()
        if _has_matrix(module) and layer not in seen.inputs and size in _sides(block, layer)
    ]
    _add_uncalled(name, uncalled, readers, writers)
    found = Residual(size, frozenset(), frozenset(), norms, readers, frozenset(writers), {})
    found = replace(found, values=_find_values(model, block, run, hidden, found))
    expected = run(hidden)
    stream = rotation(size, seed=2)
    rotate_parameters(
        Turn(found, stream, {v: rotation(w.size, 3) for v, w in found.values.items()}), block
    )
    actual = run(stream.apply(hidden))
    if not _close(actual, stream.apply(expected), expected - hidden):
        raise _Unfit(f"{name} computes something else when its residual stream is rotated")
    return found


def _watch(block: nn.Module, run: _Run, hidden: Tensor, size: int) -> _Seen:
    seen = _Seen()

    def hook(into: dict[str, Tensor], out_of: dict[str, Tensor], name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                into[name] = args[0]
            if isinstance(output, Tensor):
                out_of[name] = output

        return note

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if _has_matrix(module):
                note = hook(seen.inputs, seen.outputs, name)
            elif _width(module) == size and gain_offset(module) is not None:
                note = hook(seen.unnormed, seen.normed, name)
            else:
                continue
            stack.callback(module.register_forward_hook(note).remove)
        run(hidden)
    return seen


def _find_writers(
    block: nn.Module, run: _Run, hidden: Tensor, candidates: Sequence[str]
) -> set[str]:
    """Layers as wide as the stream whose output reaches it, and not by way of another such layer.

    One at a time (experts: one kind at a time) returns noise, and the others nothing at all.
    """
    wide = [layer for layer in candidates if _sides(block, layer)[0] == hidden.shape[-1]]

    def alone(kind: str | None) -> Tensor:
        def hook(_: nn.Module, __: Any, output: Tensor, name: str) -> Tensor:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
            return noise if _unnumbered(name) == kind else torch.zeros_like(output)

        with ExitStack() as stack:
            for layer in wide:
                module = block.get_submodule(layer)
                stack.callback(module.register_forward_hook(partial(hook, name=layer)).remove)
            return run(hidden)

    silence = alone(None)
    writing = {
        kind
        for kind in {_unnumbered(layer) for layer in wide}
        if not torch.equal(alone(kind), silence)
    }
    return {layer for layer in wide if _unnumbered(layer) in writing}


def _add_uncalled(
    name: str, uncalled: Sequence[str], readers: dict[str, str], writers: set[str]
) -> None:
    """Experts to which no token went do what those do that have the same name but for numbers."""
    reading = {_unnumbered(layer): norm for layer, norm in readers.items()}
    writing = {_unnumbered(layer) for layer in writers}
    for layer in uncalled:
        if _unnumbered(layer) in reading:
            readers[layer] = reading[_unnumbered(layer)]
        elif _unnumbered(layer) in writing:
            writers.add(layer)
        else:
            raise _Unfit(f"{name}.{layer} is not called as a layer is")


def _find_values(
    model: PreTrainedModel, block: nn.Module, run: _Run, hidden: Tensor, found: Residual
) -> dict[str, Values]:
    """Ways of values that bear a rotation of their heads: tried out, and left as they were."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return {}
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or found.size // heads
    rows = groups * size
    expected = run(hidden)
    ways: dict[str, Values] = {}
    for output in sorted(found.writers):
        if _sides(block, output)[1] != heads * size:
            continue
        for layer in found.readers:
            wide = _sides(block, layer)[0]
            # Alone, or the last rows of a layer that makes queries and keys as well.
            if wide not in (rows, heads * size + 2 * rows):
                continue
            way = Values(layer, wide - rows, wide, size, output)
            if _close(_run_turned(block, run, hidden, way), expected, expected - hidden):
                ways[layer] = way
                break
    return ways


def _run_turned(block: nn.Module, run: _Run, hidden: Tensor, way: Values) -> Tensor:
    turn = rotation(way.size, seed=4)
    weight = f"{way.output}.weight"
    changed: dict[str, Tensor] = {weight: turn_columns(block.get_parameter(weight), turn)}
    for name, value in block.get_submodule(way.layer).named_parameters(prefix=way.layer):
        changed[name] = turn_heads(value, way, turn)
    kept: dict[str, Tensor] = {name: block.get_parameter(name) for name in changed}
    for name in changed:
        put_parameter(block, name, changed[name])
    result = run(hidden)
    for name in kept:
        put_parameter(block, name, kept[name])
    return result


def _offset(name: str, norm: nn.Module) -> float:
    """What an RMSNorm adds to its weight; raises _Unfit for another norm, which minds rotations."""
    offset = gain_offset(norm)
    weight = norm.get_parameter("weight")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(_TOKENS, len(weight), generator=generator) + 0.5
    assert offset is not None
    if norm._parameters.get("bias") is None:
        plain = functional_call(norm, {"weight": torch.full_like(x[0], 1.0 - offset)}, (x,))
        if _close(
            plain / plain.norm(dim=1, keepdim=True), unit := nn.functional.normalize(x), unit
        ):
            return offset
    raise _Unfit(f"{name} is a LayerNorm: taking the mean away (or adding a bias) minds a rotation")


def _fill(part: nn.Module, rows: int | None = None) -> None:
    """Make up every parameter, none of them special; `rows` cuts a matrix to so many."""
    generator = torch.Generator().manual_seed(6)
    for name, parameter in list(part.named_parameters()):
        shape = (rows or parameter.shape[0], *parameter.shape[1:])
        value = torch.randn(shape, generator=generator)
        put_parameter(part, name, 1 + 0.2 * value if len(shape) == 1 else value / shape[-1] ** 0.5)


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def _sides(block: nn.Module, layer: str) -> tuple[int, int]:
    outputs, inputs = block.get_parameter(f"{layer}.weight").shape
    return outputs, inputs


def _width(module: nn.Module) -> int | None:
    """Of a vector of weights."""
    weight = module._parameters.get("weight")
    return len(weight) if weight is not None and weight.ndim == 1 else None


def _rows_of(rows: Tensor, output: Tensor) -> bool:
    """Whether all rows are rows of `output`, which may have been picked or reshaped."""
    if not rows.numel() or rows.shape[-1] != output.shape[-1]:
        return False
    picked, whole = (t.reshape(-1, 1, t.shape[-1]) for t in (rows, output))
    return bool((picked == whole.transpose(0, 1)).all(dim=-1).any(dim=1).all())


def _close(actual: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return bool((actual - expected).norm() <= _TOLERANCE * scale.norm())


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)
