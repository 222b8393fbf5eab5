"""Cut blocks, heads, channels and hidden width out of a model, whole units at a time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.anatomy import Anatomy, anatomy
from infopt.core.compression.magnitude import largest, magnitudes
from infopt.core.compression.shrink import Kept, shrink
from infopt.core.files import write_atomically
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.pruning.importance import at_random, norm_gain
from infopt.core.pruning.job import PartCheckpoint, PruneJob, Staged
from infopt.core.pruning.measure import Measured, measure
from infopt.core.pruning.output import recipe_files
from infopt.core.pruning.sizes import Shape, between
from infopt.core.pruning.target import needs_text, predicted_latency, whole_shape
from infopt.core.reports.prune import PrunedPart

_SEEDS = 1_000_003


@dataclass(frozen=True, slots=True)
class _Origin:
    """What is left, by its numbers in the original model."""

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    @classmethod
    def of(cls, shape: Shape) -> "_Origin":
        layers = tuple(range(shape.layers))
        return cls(
            layers,
            tuple(tuple(range(shape.groups)) for _ in layers),
            tuple(tuple(range(shape.ffn)) for _ in layers),
            tuple(range(shape.hidden)),
        )

    def after(self, kept: Kept) -> "_Origin":
        """What is left after one more cut."""

        def pick(
            own: tuple[tuple[int, ...], ...], units: tuple[tuple[int, ...], ...] | None
        ) -> tuple[tuple[int, ...], ...]:
            rows = [own[layer] for layer in kept.layers]
            if units is None:
                return tuple(rows)
            return tuple(
                tuple(row[unit] for unit in chosen) for row, chosen in zip(rows, units, strict=True)
            )

        return _Origin(
            tuple(self.layers[layer] for layer in kept.layers),
            pick(self.heads, kept.heads),
            pick(self.ffn, kept.ffn),
            self.hidden if kept.hidden is None else tuple(self.hidden[i] for i in kept.hidden),
        )


def make_structured(
    job: PruneJob, tokens: Tensor, checkpoint: PartCheckpoint, progress: ProgressCallback
) -> Staged:
    """Measure, choose, cut, as often as the settings say, and stage the artifact.

    A round that is done is durable, and within a round every block that was measured.
    """
    whole, target = job.parts, job.shape
    assert whole is not None and target is not None
    start = whole_shape(whole)
    artifact, origin = job.artifact, _Origin.of(start)
    rounds = between(start, target, job.settings.iterations)
    for number, shape in enumerate(rounds):
        place = checkpoint.stage(f"round-{number}")
        parts = whole if number == 0 else anatomy(artifact)
        kept = _kept(job, artifact, parts, shape, tokens, number, checkpoint, progress)
        if not place.exists():
            progress(Progress("cutting", number, len(rounds)))
            small = shrink(artifact, parts, kept)
            write_artifact(
                place,
                source=job.artifact,
                tensors=small.tensors(),
                config=small.config,
                extra=recipe_files(job.settings),
            )
        artifact, origin = read_artifact(place), origin.after(kept)
    told = f"decoding is predicted to take {predicted_latency(job.artifact, whole, target):.2f}x"
    warnings = (f"{told} of its time (by the bytes of the weights; measure it with infopt bench)",)
    return Staged(artifact, _rows(whole, start, origin), warnings)


def _kept(
    job: PruneJob,
    artifact: Artifact,
    parts: Anatomy,
    shape: Shape,
    tokens: Tensor,
    number: int,
    checkpoint: PartCheckpoint,
    progress: ProgressCallback,
) -> Kept:
    """What stays in this round, chosen now or in an earlier try."""
    place = checkpoint.stage(f"kept-{number}.json")
    if not place.exists():
        whole = whole_shape(parts)
        measured = None
        if needs_text(job.settings, whole, shape):
            measured = measure(
                job, artifact, parts, tokens, f"round-{number}", checkpoint, progress
            )
        kept = _choose(job, artifact, parts, whole, shape, measured, number)
        write_atomically(place, json.dumps(asdict(kept)))
    return _read(place)


def _read(place: Path) -> Kept:
    found = json.loads(place.read_bytes())

    def rows(value: list[list[int]] | None) -> tuple[tuple[int, ...], ...] | None:
        return None if value is None else tuple(tuple(row) for row in value)

    return Kept(
        layers=tuple(found["layers"]),
        heads=rows(found["heads"]),
        ffn=rows(found["ffn"]),
        hidden=None if found["hidden"] is None else tuple(found["hidden"]),
        gains=found["gains"],
    )


def _choose(
    job: PruneJob,
    artifact: Artifact,
    parts: Anatomy,
    whole: Shape,
    shape: Shape,
    measured: Measured | None,
    number: int,
) -> Kept:
    settings = job.settings
    seed = (settings.seed * _SEEDS + number) % 2**63
    if settings.depth_importance == "block-influence" and measured is not None:
        depth = measured.influence
    else:
        depth = at_random(whole.layers, seed)
    layers = largest(depth, shape.layers)
    heads, ffn, hidden = _width_scores(job, artifact, parts, whole, shape, measured, seed)
    chosen = largest(hidden, shape.hidden) if shape.hidden < whole.hidden else None
    norms = measured.norms if measured is not None and chosen is not None else {}
    return Kept(
        layers=layers,
        heads=_per_layer(layers, heads, shape.groups) if shape.groups < whole.groups else None,
        ffn=_per_layer(layers, ffn, shape.ffn) if shape.ffn < whole.ffn else None,
        hidden=chosen,
        gains={norm: norm_gain(shares, chosen or ()) for norm, shares in norms.items()},
    )


def _per_layer(
    layers: Sequence[int], scores: Sequence[Tensor], count: int
) -> tuple[tuple[int, ...], ...]:
    return tuple(largest(scores[layer], count) for layer in layers)


def _width_scores(
    job: PruneJob,
    artifact: Artifact,
    parts: Anatomy,
    whole: Shape,
    shape: Shape,
    measured: Measured | None,
    seed: int,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
    """Scores of heads and channels of each block, and of the hidden width."""
    if (shape.groups, shape.ffn, shape.hidden) == (whole.groups, whole.ffn, whole.hidden):
        return (), (), torch.zeros(0)
    match job.settings.importance:
        case "minitron":
            assert measured is not None
            return measured.heads, measured.ffn, measured.hidden
        case "magnitude":
            sizes = magnitudes(artifact, parts)
            return sizes.heads, sizes.ffn, sizes.hidden
        case "random":
            seeds = range(seed + 1, seed + 1 + whole.layers)
            return (
                [at_random(whole.groups, s) for s in seeds],
                [at_random(whole.ffn, s) for s in seeds],
                at_random(whole.hidden, seed),
            )


def _rows(whole: Anatomy, start: Shape, left: _Origin) -> tuple[PrunedPart, ...]:
    """Of every part that something was removed from."""
    found = [_row("layers", "layers", start.layers, left.layers)]
    for layer, heads, ffn in zip(left.layers, left.heads, left.ffn, strict=True):
        name = whole.blocks[layer].name
        found.append(_row(name, "heads", start.groups, heads))
        found.append(_row(name, "ffn", start.ffn, ffn))
    found.append(_row("hidden", "hidden", start.hidden, left.hidden))
    return tuple(row for row in found if row.removed)


def _row(name: str, kind: str, total: int, left: Sequence[int]) -> PrunedPart:
    gone = tuple(sorted(set(range(total)) - set(left)))
    return PrunedPart.model_validate(
        {"name": name, "kind": kind, "total": total, "removed": len(gone), "gone": gone}
    )
