"""The proof that a smaller config computes what the larger model does without the parts cut out."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infopt.core.artifact.headers import TensorHeader
from infopt.core.artifact.read import CONFIG, Artifact
from infopt.core.compression.dissect import Group
from infopt.core.compression.residual import put_parameter
from infopt.core.compression.trial import Trial, close, fill, states
from infopt.core.errors import InfoptError, UnsupportedError
from infopt.core.models.hf import blocks, release, skeleton

Cut = tuple[int, Tensor]
"""An axis of a parameter, and the indices that stay."""
_SAME = 1e-5


def small_skeleton(
    artifact: Artifact, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[PreTrainedModel, Artifact]:
    """The model that a config and stored tensors of these shapes make, and its headers.

    Raises UnsupportedError where transformers does not take the config or the tensors' names.
    """
    headers = {
        name: TensorHeader(artifact.path, "float32", shape, 4 * torch.Size(shape).numel())
        for name, shape in shapes.items()
    }
    with tempfile.TemporaryDirectory(prefix="infopt-") as folder:
        path = Path(folder)
        (path / CONFIG).write_text(json.dumps(config))
        files = dict.fromkeys(headers, artifact.path)
        small = Artifact(artifact.name, path, dict(config), files, headers)
        try:
            return skeleton(small, torch.float32), small
        except InfoptError as error:
            reason = error.message.replace(str(path / CONFIG), "its config").replace(
                str(path), "it"
            )
            raise UnsupportedError(
                f"{artifact.name} cannot have this shape: {reason}", error.hint
            ) from error


def check_shapes(
    name: str,
    large: PreTrainedModel,
    small: PreTrainedModel,
    origin: Mapping[str, str],
    cuts: Mapping[str, Sequence[Cut]],
) -> None:
    """Raise UnsupportedError where a parameter of `small` is not as large as what stays of it.

    `origin` gives the name in `large` of each parameter of `small`.
    """
    for own, value in small.named_parameters(remove_duplicate=False):
        shape = list(large.get_parameter(origin[own]).shape)
        for axis, indices in cuts.get(origin[own], ()):
            shape[axis] = len(indices)
        if shape != list(value.shape):
            raise UnsupportedError(
                f"{name} cannot have this shape: what stays of {own} is {shape}, and its config "
                f"can only say {list(value.shape)}",
                "in some architectures the hidden width is heads * head size: cut both alike, or "
                "neither",
            )


@torch.no_grad()
def check_blocks(
    name: str,
    large: PreTrainedModel,
    small: PreTrainedModel,
    layers: Sequence[int],
    groups: Mapping[int, Sequence[tuple[Group, Sequence[int]]]],
    cuts: Mapping[str, Sequence[Cut]],
) -> None:
    """Raise UnsupportedError where a block of `small` computes something else than the original.

    `groups`: of each original block that stays the parts that were cut and the units that stay. The
    first and the last block are tried, and one of each kind, on made-up weights.
    """
    trials = Trial(large), Trial(small)
    kinds: dict[tuple[tuple[str, torch.Size], ...], int] = {}
    for new, old in enumerate(layers):
        block = blocks(large)[old][1]
        kinds.setdefault(tuple((n, p.shape) for n, p in block.named_parameters()), new)
    for new in sorted({0, len(layers) - 1, *kinds.values()}):
        old = layers[new]
        (prefix, block), (_, part) = blocks(large)[old], blocks(small)[new]
        fill(block)
        for local, value in list(block.named_parameters()):
            put_parameter(part, local, sliced(value, cuts.get(f"{prefix}.{local}", ())).clone())
        for group, kept in groups.get(old, ()):
            _silence(large, group, kept)
        hidden = states(trials[0].embedded().shape[-1])
        expected, actual = (
            trial.run_of(index)(hidden) for trial, index in zip(trials, (old, new), strict=True)
        )
        release(block)
        release(part)
        if not close(actual, expected, expected - hidden):
            raise UnsupportedError(
                f"{name} cannot have this shape: its block {old}, as block {new} of the smaller "
                "model, computes something else",
                "its place among the blocks or its number of heads matters to it",
            )


@torch.no_grad()
def embedding_ratio(
    name: str,
    large: PreTrainedModel,
    small: PreTrainedModel,
    hidden: Sequence[int],
    cuts: Mapping[str, Sequence[Cut]],
) -> float:
    """How much larger the embedded tokens are in `large` than in `small` for the same weights.

    1 for most; not for models that scale by the hidden width (Gemma). Raises UnsupportedError where
    they differ by more than a factor.
    """
    big, little = Trial(large), Trial(small)
    for own, value in little.ends().items():
        whole = big.ends()[own]
        put_parameter(small, own, sliced(whole, cuts.get(own, ())).clone())
        assert value.shape == small.get_parameter(own).shape
    expected, actual = big.embedded()[..., list(hidden)], little.embedded()
    ratio = float((expected * actual).sum() / (actual * actual).sum())
    if not close(actual * ratio, expected, expected):
        raise UnsupportedError(
            f"the hidden width of {name} cannot be cut: its embeddings are not its channels' alone"
        )
    return 1.0 if abs(ratio - 1) < _SAME else ratio


def sliced(value: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """What stays of a tensor."""
    for axis, indices in cuts:
        value = value.index_select(axis, indices)
    return value


def _silence(model: PreTrainedModel, group: Group, kept: Sequence[int]) -> None:
    """Let the writer read nothing of the units that do not stay."""
    gone = sorted(set(range(group.units)) - set(kept))
    for axis in group.axes:
        if axis.parameter == f"{group.writer}.weight" and gone:
            value = model.get_parameter(axis.parameter)
            put_parameter(model, axis.parameter, value.index_fill(1, axis.indices(gone), 0.0))
