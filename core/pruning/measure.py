"""Measure how much blocks, heads and channels matter, on one walk through a model."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from infopt.core.artifact.read import Artifact
from infopt.core.compression.anatomy import Anatomy
from infopt.core.compression.calibration import BATCH_TOKENS, batches
from infopt.core.compression.norms import gain_offset
from infopt.core.compression.walk import Walk
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.pruning.importance import (
    channel_means,
    head_means,
    influence,
    over_batches,
    relative_squares,
)
from infopt.core.pruning.job import PROBE_TOKENS, PartCheckpoint, PruneJob


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores, the higher the more it matters."""

    influence: Tensor
    """Of each block: [layers]."""
    heads: tuple[Tensor, ...]
    """Of each block: [kv_groups]; empty where not proved, as the others."""
    ffn: tuple[Tensor, ...]
    hidden: Tensor
    """Summed over the norms: [hidden_size]."""
    norms: Mapping[str, Tensor]
    """Of RMSNorms on the stream, by full name: `relative_squares` of what they are given."""


@dataclass(slots=True)
class _Noted:
    """What the batches showed of a block, one entry a batch, the probe first."""

    heads: list[Tensor] = field(default_factory=list)
    ffn: list[Tensor] = field(default_factory=list)
    normed: dict[str, list[Tensor]] = field(default_factory=dict)
    squares: dict[str, list[Tensor]] = field(default_factory=dict)


@torch.no_grad()
def measure(
    job: PruneJob,
    artifact: Artifact,
    parts: Anatomy,
    tokens: Tensor,
    label: str,
    checkpoint: PartCheckpoint,
    progress: ProgressCallback,
) -> Measured:
    """Walk once; a block's scores are durable when it is done, under names that `label` begins."""
    if any(not name.startswith(f"{label}.") for name in checkpoint.names()):
        checkpoint.restart()  # they are an earlier round's
    data = batches(tokens, BATCH_TOKENS)
    walk = Walk(artifact, tokens[:1, :PROBE_TOKENS], data, job.dtype, job.device)
    progress(Progress("embedding the calibration text"))
    walk.start()
    if checkpoint.finished:
        walk.skip_to(checkpoint.finished, checkpoint.hidden())
    resumed, total = checkpoint.finished, len(walk.names)
    for index in range(resumed, total):
        progress(Progress("measuring importance", index, total, resumed=resumed))
        walk.load()
        before = list(walk.hidden)
        noted = _Noted()
        with ExitStack() as hooks:
            _watch(hooks, walk, parts, index, noted)
            walk.advance()
        turned = [influence(b, a) for b, a in zip(before[1:], walk.hidden[1:], strict=True)]
        scores = {"influence": torch.cat(turned).mean()} | _scores(noted)
        if index == total - 1:
            scores |= _last_norm(walk, parts)
        named = {f"{label}.{index}.{key}": value.cpu() for key, value in scores.items()}
        checkpoint.commit(named, (), walk.hidden)
    return _gathered(parts, label, checkpoint)


def _gathered(parts: Anatomy, label: str, checkpoint: PartCheckpoint) -> Measured:
    names, blocks = checkpoint.names(), range(len(parts.blocks))

    def read(kind: str) -> dict[str, Tensor]:
        return {
            name.partition(f".{kind}.")[2]: checkpoint.tensor(name)
            for name in names
            if f".{kind}." in name
        }

    def all_blocks(kind: str) -> tuple[Tensor, ...]:
        wanted = [f"{label}.{index}.{kind}" for index in blocks]
        return tuple(checkpoint.tensor(name) for name in wanted) if wanted[0] in names else ()

    normed = list(read("normed").values())
    return Measured(
        influence=torch.stack(all_blocks("influence")),
        heads=all_blocks("heads"),
        ffn=all_blocks("ffn"),
        hidden=torch.stack(normed).sum(dim=0) if normed else torch.zeros(0),
        norms=read("squares"),
    )


def _watch(hooks: ExitStack, walk: Walk, parts: Anatomy, index: int, noted: _Noted) -> None:
    """Reduce what each batch shows as it passes: nothing of the size of activations is kept."""
    block = parts.blocks[index]

    def shaped(value: Tensor, known: list[Tensor]) -> Tensor:
        # Some models' layers are given the tokens of all windows in one row.
        return value.reshape(len(walk.tokens[len(known)]), -1, value.shape[-1])

    def note_heads(_: nn.Module, args: tuple[Any, ...]) -> None:
        outputs = shaped(args[0], noted.heads)
        noted.heads.append(head_means(outputs, parts.kv_groups, parts.queries))

    def note_ffn(_: nn.Module, args: tuple[Any, ...]) -> None:
        noted.ffn.append(channel_means(shaped(args[0], noted.ffn)))

    for group, hook in ((block.heads, note_heads), (block.ffn, note_ffn)):
        if group is not None:
            writer = walk.model.get_submodule(group.writer)
            hooks.callback(writer.register_forward_pre_hook(hook).remove)
    for name in _norms(walk.model, parts, f"{block.name}."):
        _watch_norm(hooks, walk, name, noted)


def _watch_norm(hooks: ExitStack, walk: Walk, name: str, noted: _Noted) -> None:
    module = walk.model.get_submodule(name)
    normed = noted.normed.setdefault(name, [])
    squares = noted.squares.setdefault(name, []) if takes_no_mean(module) else None

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        batch = len(walk.tokens[len(normed)])
        normed.append(channel_means(output.reshape(batch, -1, output.shape[-1])))
        if squares is not None:
            squares.append(relative_squares(args[0]))

    hooks.callback(module.register_forward_hook(note).remove)


def _scores(noted: _Noted) -> dict[str, Tensor]:
    """Over all batches but the probe."""
    found = {}
    if noted.heads:
        found["heads"] = over_batches(noted.heads[1:])
    if noted.ffn:
        found["ffn"] = over_batches(noted.ffn[1:])
    found |= {f"normed.{name}": over_batches(seen[1:]) for name, seen in noted.normed.items()}
    found |= {
        f"squares.{name}": torch.stack(seen[1:]).mean(dim=0) for name, seen in noted.squares.items()
    }
    return found


def _last_norm(walk: Walk, parts: Anatomy) -> dict[str, Tensor]:
    """What the norm after the last block is given and returns."""
    inside = parts.blocks[0].name.rpartition(".")[0] + "."
    names = [n for n in _norms(walk.model, parts, "") if not n.startswith(inside)]
    if len(names) != 1:
        return {}
    walk.fill_outside()
    module = walk.model.get_submodule(names[0])
    means, squares = [], []
    for hidden in walk.hidden[1:]:
        states = hidden.to(walk.device)
        means.append(channel_means(module(states)))
        squares.append(relative_squares(states))
    found = {f"normed.{names[0]}": over_batches(means)}
    if takes_no_mean(module):
        found[f"squares.{names[0]}"] = torch.stack(squares).mean(dim=0)
    return found


def _norms(model: nn.Module, parts: Anatomy, prefix: str) -> list[str]:
    """The norms on the stream whose names begin so."""
    owners = dict.fromkeys(
        axis.parameter.rpartition(".")[0]
        for axis in parts.hidden
        if axis.parameter.startswith(prefix) and axis.parameter.endswith(".weight")
    )
    return [name for name in owners if gain_offset(model.get_submodule(name)) is not None]


def takes_no_mean(norm: nn.Module) -> bool:
    """Whether a norm is an RMSNorm: what is added to all channels changes its result."""
    weight = norm.get_parameter("weight")
    x = torch.randn(1, 2, len(weight), generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    return not torch.allclose(norm(x), norm(x + 1), atol=1e-2, rtol=1e-2)
