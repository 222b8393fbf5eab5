"""Which rows and columns of a decoder's weights go together, so that a part can be cut out whole.

Units are KV groups (a key head, its value head and the query heads that share them), channels of
the feed-forward network, and channels of the hidden width. Which tensors they run through is
guessed by shape and order of calls, and proved by running each kind of block on made-up weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.compression.dissect import Axis, Found, Group, PartName, Sizes, study
from infopt.core.compression.residual import put_parameter
from infopt.core.compression.trial import Trial, close, fill
from infopt.core.errors import UnsupportedError
from infopt.core.models.hf import blocks, release, skeleton


@dataclass(frozen=True, slots=True)
class BlockAnatomy:
    """The parts of one block; None where they are not proved."""

    name: str
    heads: Group | None
    ffn: Group | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What can be cut out of a model; whole blocks can always be tried."""

    model: str
    blocks: tuple[BlockAnatomy, ...]
    hidden: tuple[Axis, ...]
    """Every axis along the residual stream, in blocks and around them; empty: not proved."""
    hidden_size: int
    ffn_size: int
    """Channels of each block; 0 where not proved."""
    kv_groups: int
    queries: int
    """Query heads that share a KV group."""
    head_dim: int
    why_not: Mapping[PartName, str]
    """Of the parts that are not proved, why."""

    def require(self, part: PartName) -> None:
        """Raise UnsupportedError where the part cannot be cut."""
        if part in self.why_not:
            raise UnsupportedError(
                f"the {_WORDS[part]} of {self.model} cannot be cut: {self.why_not[part]}",
                "whole layers can be left out of it: --layers",
            )


_WORDS: dict[PartName, str] = {
    "heads": "attention heads",
    "ffn": "feed-forward channels",
    "hidden": "hidden width",
}


@torch.no_grad()
def anatomy(artifact: Artifact) -> Anatomy:
    """The parts of a model, proved on made-up weights, one block of each kind in memory at a time.

    A part that cannot be proved is named in `why_not`. Raises UnsupportedError for a model that
    transformers does not know, that has no list of blocks, or that is quantized.
    """
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized already", "give the model it was made from"
        )
    model = skeleton(artifact, torch.float32)
    sizes = _sizes(model, artifact)
    trial = Trial(model)
    known: dict[tuple[tuple[str, torch.Size], ...], Found] = {}
    found: list[Found] = []
    for index, (_, block) in enumerate(blocks(model)):
        # Blocks with the same parameters are of one kind.
        kind = tuple((local, p.shape) for local, p in block.named_parameters())
        if kind not in known:
            fill(block)
            known[kind] = study(block, trial.run_of(index), sizes)
            release(block)
        found.append(known[kind])
    why_not = {part: reason for each in found for part, reason in each.why_not.items()}
    ends: tuple[Axis, ...] = ()
    if "hidden" not in why_not:
        ends, fault = _find_ends(trial, sizes.hidden)
        why_not |= {"hidden": fault} if fault else {}
    return _joined(artifact, model, sizes, found, ends, why_not)


def _joined(
    artifact: Artifact,
    model: PreTrainedModel,
    sizes: Sizes,
    found: Sequence[Found],
    ends: tuple[Axis, ...],
    why_not: dict[PartName, str],
) -> Anatomy:
    names = [name for name, _ in blocks(model)]
    channels = {each.ffn.units for each in found if each.ffn is not None}
    if len(channels) > 1:
        why_not["ffn"] = "its blocks have networks of different widths"
    hidden = [_full(a, name) for name, each in zip(names, found, strict=True) for a in each.hidden]
    return Anatomy(
        model=artifact.name,
        blocks=tuple(
            BlockAnatomy(
                name,
                None if "heads" in why_not else _within(each.heads, name),
                None if "ffn" in why_not else _within(each.ffn, name),
            )
            for name, each in zip(names, found, strict=True)
        ),
        hidden=() if "hidden" in why_not else (*ends, *hidden),
        hidden_size=sizes.hidden,
        ffn_size=0 if "ffn" in why_not else max(channels),
        kv_groups=sizes.groups,
        queries=sizes.queries,
        head_dim=sizes.head_dim,
        why_not=why_not,
    )


def _sizes(model: PreTrainedModel, artifact: Artifact) -> Sizes:
    config = model.config.get_text_config()
    hidden, heads = (getattr(config, key, None) for key in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int) or not isinstance(heads, int):
        raise UnsupportedError(
            f"the config of {artifact.name} names no hidden_size or no num_attention_heads"
        )
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(hidden, heads, groups, getattr(config, "head_dim", None) or hidden // heads)


def _find_ends(trial: Trial, size: int) -> tuple[tuple[Axis, ...], str | None]:
    """The axes along the stream around the blocks, proved alike; else why not."""
    axes: list[Axis] = []
    for name, value in trial.ends().items():
        owner = trial.model.get_submodule(name.rpartition(".")[0])
        if size not in value.shape:
            continue
        wordy = owner in (trial.model.get_input_embeddings(), trial.model.get_output_embeddings())
        if value.ndim == 1 and not wordy:
            axes.append(Axis(name, 0, ((0, 1, 1),)))
        elif value.ndim == 2 and (wordy or isinstance(owner, nn.Embedding)):
            axes.append(Axis(name, 1, ((0, 1, 1),)))
        elif value.ndim == 2 and value.shape[0] != value.shape[1]:
            axes.append(Axis(name, tuple(value.shape).index(size), ((0, 1, 1),)))
        else:
            return (), f"it is not clear which side of {name} is the hidden width"
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    expected = trial.run_around()
    for axis in axes:
        own = trial.model.get_parameter(axis.parameter)
        put_parameter(trial.model, axis.parameter, own.index_select(axis.axis, order))
    if not close(trial.run_around(), expected, expected):
        return (), "what lies around its blocks minds the order of the channels"
    return tuple(axes), None


def _full(axis: Axis, block: str) -> Axis:
    return replace(axis, parameter=f"{block}.{axis.parameter}")


def _within(group: Group | None, block: str) -> Group | None:
    """The same with full names."""
    if group is None:
        return None
    return replace(
        group,
        axes=tuple(_full(axis, block) for axis in group.axes),
        writer=f"{block}.{group.writer}",
        readers=tuple(f"{block}.{layer}" for layer in group.readers),
    )
