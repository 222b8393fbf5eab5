"""A student cut out of its teacher: some of its layers, heads and channels, its sizes its own.

Layers are taken evenly, the first and the last among them, as DistilBERT takes every other one
(Sanh et al., 2019, https://arxiv.org/abs/1910.01108); heads and channels by the size of their
weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.anatomy import Anatomy, anatomy
from infopt.core.compression.magnitude import Magnitudes, largest, magnitudes
from infopt.core.compression.shrink import Kept, Shrunk, shrink
from infopt.core.errors import UsageError
from infopt.core.recipe.distill import Size, StudentShape

_MULTIPLES = (32, 8)
"""Shares of widths are rounded to the first of these that divides the whole."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A student yet to be written, and the teacher's layers that it has."""

    shrunk: Shrunk
    layers: tuple[int, ...]


def plan_student(teacher: Artifact, shape: StudentShape) -> Cut:
    """The sizes of a student; which heads and channels it gets is not looked at yet."""
    found = anatomy(teacher)
    kept = choose(found, shape, None)
    return Cut(shrink(teacher, found, kept), kept.layers)


def cut_student(teacher: Artifact, shape: StudentShape) -> Cut:
    """The student that is cut out of `teacher`.

    Raises UsageError for sizes that the teacher has not, UnsupportedError for parts of it that
    cannot be cut.
    """
    found = anatomy(teacher)
    wanted = shape.heads, shape.ffn, shape.hidden
    sizes = None if wanted == (None, None, None) else magnitudes(teacher, found)
    kept = choose(found, shape, sizes)
    return Cut(shrink(teacher, found, kept), kept.layers)


def write_student(
    folder: Path, teacher: Artifact, cut: Cut, *, random: bool, seed: int
) -> Artifact:
    """Write a student as an artifact, with the teacher's weights or random ones."""
    tensors = _random_tensors(cut, seed) if random else cut.shrunk.tensors()
    return write_artifact(
        folder, source=teacher, tensors=tensors, config=cut.shrunk.config, replace=True
    )


def choose(found: Anatomy, shape: StudentShape, sizes: Magnitudes | None) -> Kept:
    """What stays of a teacher; where no sizes of weights are given, the first of each part."""
    total = len(found.blocks)
    layers = evenly(total, _whole("layers", shape.layers, total, 1))
    heads = ffn = hidden = None
    if shape.heads is not None:
        found.require("heads")
        count = _groups(found, shape.heads)
        heads = tuple(_best(None if sizes is None else sizes.heads[n], count) for n in layers)
    if shape.ffn is not None:
        found.require("ffn")
        count = _width("ffn", shape.ffn, found.ffn_size)
        ffn = tuple(_best(None if sizes is None else sizes.ffn[n], count) for n in layers)
    if shape.hidden is not None:
        found.require("hidden")
        count = _width("hidden", shape.hidden, found.hidden_size)
        hidden = _best(None if sizes is None else sizes.hidden, count)
    return Kept(layers, heads, ffn, hidden)


def evenly(total: int, count: int) -> tuple[int, ...]:
    """`count` of `total` layers, the first and the last among them; of one, the first."""
    if count == 1:
        return (0,)
    return tuple(round(index * (total - 1) / (count - 1)) for index in range(count))


def _groups(found: Anatomy, heads: Size) -> int:
    """Query heads as the KV groups that they belong to."""
    if isinstance(heads, float):
        return _whole("heads", heads, found.kv_groups, 1)
    if heads % found.queries:
        raise UsageError(
            f"heads={heads} does not divide: {found.queries} query heads share a key",
            f"ask for a multiple of {found.queries}",
        )
    return _whole("heads", heads // found.queries, found.kv_groups, 1, shown=found.queries)


def _width(what: str, size: Size, whole: int) -> int:
    multiple = next((m for m in _MULTIPLES if whole % m == 0), 1)
    return _whole(what, size, whole, multiple)


def _whole(what: str, size: Size | None, whole: int, multiple: int, shown: int = 1) -> int:
    """A size as a number of units; a share is rounded to a multiple. `shown`: of what a unit is."""
    if size is None:
        return whole
    if isinstance(size, float):
        return min(whole, max(multiple, round(size * whole / multiple) * multiple))
    if size > whole:
        raise UsageError(f"the teacher has {whole * shown} {what}, not {size * shown}")
    return size


def _best(scores: Tensor | None, count: int) -> tuple[int, ...]:
    return tuple(range(count)) if scores is None else largest(scores, count)


def _random_tensors(cut: Cut, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Of a model as transformers begins one, in the dtype of the teacher's tensors."""
    with TemporaryDirectory() as folder:
        config = AutoConfig.for_model(**cut.shrunk.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        made = read_artifact(Path(folder))
        dtypes = {name: tensor.dtype for name, tensor in cut.shrunk.tensors()}
        for name in made.names():
            value = made.tensor(name)
            yield name, value.to(dtypes.get(name, torch.float32))
