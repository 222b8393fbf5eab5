"""Rotate a dense model: the same function, its activations without outliers.

A randomized Hadamard rotation of the residual stream, and one of each block's values, are folded
into the weights, so nothing is left to compute at run time (QuaRot, Ashkboos et al. 2024, arXiv
2404.00456, without its rotations online; SpinQuant's R1 and R2, arXiv 2405.16406, not learned).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.finite import all_finite
from infopt.core.compression.residual import Residual, Turn
from infopt.core.compression.streams import find_residual
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError, UnsupportedError, UsageError
from infopt.core.files import check_output, directory_atomically
from infopt.core.formats.hadamard import rotation
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.hf import skeleton
from infopt.core.models.sources import find_source
from infopt.core.progress import Progress, ProgressCallback, silent

_TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
"""Largest difference of the probe's logits, as a share of their spread, by the stored dtype.

What a fold does is proved beforehand, in float32; this holds the file to it. Rounding the rotated
weights to bfloat16 leaves 0.05 on the default model (30 blocks), a wrong weight about 1.
"""
_PROBE = (2, 32)


@dataclass(frozen=True, slots=True)
class RotateResult:
    """The rotated artifact and what a user should know of it."""

    artifact: Artifact
    untied: bool
    """The head shared the embedding's weight and has its own now: the artifact is larger."""
    value_layers: int
    """Blocks whose values are rotated on the way to the output layer; 0 if that has no such way."""
    logits_difference: float
    """RMS difference of the probe's logits to the original's, as a share of their spread; float32
    arithmetic, so it is the rounding of the rotated weights to the stored dtype."""
    logits_max_difference: float
    """The largest, in logits."""


@dataclass(frozen=True, slots=True)
class _Plan:
    residual: Residual
    parameters: Mapping[str, str]
    """The artifact's tensors that change, to the model's parameters."""
    shared: Mapping[str, str]
    """Parameters that the artifact lacks, to the tensor that they are tied to."""


def check_rotatable(artifact: Artifact) -> None:
    """Raise UnsupportedError with the reason if the model cannot be rotated; reads no weights."""
    _resolve(artifact)


def rotate(
    artifact: Artifact,
    output: Path,
    *,
    seed: int,
    progress: ProgressCallback = silent,
    replace: bool = False,
    extra: Mapping[str, str | bytes] | None = None,
) -> RotateResult:
    """Write the model, rotated, to `output` in its own dtypes, and hold its logits to the original.

    One tensor is in memory at a time, then one block. `extra` files are written beside. Raises
    UnsupportedError (model) and UsageError (output) before any work, NumericsError for weights
    that are not finite and for logits that differ by more than rounding; then nothing is left.
    """
    output = output.expanduser().absolute()
    check_output(output, replace=replace)
    if output.resolve() == artifact.path.resolve():
        raise UsageError(f"the output {output} is the model that is read", "choose another")
    plan = _resolve(artifact)
    residual = plan.residual
    turn = Turn(
        residual,
        rotation(residual.size, seed),
        # Each block's values get a rotation of their own.
        {
            layer: rotation(way.size, (seed + number) % 2**63)
            for number, (layer, way) in enumerate(residual.values.items(), 1)
        },
    )
    with directory_atomically(output, replace=replace) as folder:
        staged = write_artifact(
            folder / "rotated",
            source=artifact,
            tensors=_tensors(artifact, plan, turn, progress),
            config=_untied(artifact.config),
            extra=extra,
        )
        share, largest = _compare(artifact, staged, plan, progress)
        for file in sorted(staged.path.iterdir()):
            file.rename(folder / file.name)
        staged.path.rmdir()
    return RotateResult(
        artifact=read_artifact(output, trust_remote_code=artifact.trust_remote_code),
        untied=bool(plan.shared),
        value_layers=len(residual.values),
        logits_difference=share,
        logits_max_difference=largest,
    )


def _resolve(artifact: Artifact) -> _Plan:
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized already, and codes cannot be rotated",
            "give the model it was made from",
        )
    residual = find_residual(artifact)
    model = skeleton(artifact)
    parameters: dict[str, str] = {}
    absent: list[str] = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not residual.changes(name):
            continue
        source = find_source(model, artifact, name)
        if source.part is not None or is_transposed(model, name.rpartition(".")[0]):
            raise UnsupportedError(
                f"{artifact.name} stores {source.names[0]} in a layout that cannot be rotated",
                "only separate weights [outputs, inputs] can",
            )
        if source.names:
            parameters[source.names[0]] = name
        else:
            absent.append(name)
    ends = {name: stored for stored, name in parameters.items() if _is_end(residual, name)}
    if absent and not (len(absent) == len(ends) == 1 and _is_end(residual, absent[0])):
        raise UnsupportedError(f"{artifact.name} shares weights besides the embedding: {absent[0]}")
    return _Plan(residual, parameters, {name: next(iter(ends.values())) for name in absent})


def _is_end(residual: Residual, parameter: str) -> bool:
    """Whether it is the matrix of the embedding or of the head: what models tie."""
    module, _, leaf = parameter.rpartition(".")
    return leaf == "weight" and module in residual.embeddings | residual.heads


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The head has the last norm's gain in it, the embedding has not."""
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return changed


def _tensors(
    artifact: Artifact, plan: _Plan, turn: Turn, progress: ProgressCallback
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the rotated artifact, one at a time."""
    stored = {name: tensor for tensor, name in plan.parameters.items()}

    def gain(norm: str) -> Tensor:
        weight = artifact.tensor(stored[f"{norm}.weight"])
        return weight.to(torch.float64) + plan.residual.norms[norm]

    sources = [(name, name, plan.parameters.get(name)) for name in artifact.names()]
    sources += [(name, tensor, name) for name, tensor in plan.shared.items()]
    for done, (name, source, parameter) in enumerate(sources):
        progress(Progress("rotating", done, len(sources), name))
        value = artifact.tensor(source)
        if value.is_floating_point() and not all_finite(value):
            raise NumericsError(
                f"{artifact.files[source]}: tensor {source!r} has values that are not finite",
                "the checkpoint is broken; nothing was written",
            )
        yield name, value if parameter is None else turn.apply(parameter, value, gain)
    progress(Progress("rotating", len(sources), len(sources)))


def _compare(
    artifact: Artifact, rotated: Artifact, plan: _Plan, progress: ProgressCallback
) -> tuple[float, float]:
    """RMS difference of a probe's logits as a share of their spread, and the largest one.

    Raises NumericsError where the share exceeds the tolerance of the stored dtype.
    """
    dtypes = {artifact.dtype(name) for name in plan.parameters}
    tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    embedding = next(s for s, name in plan.parameters.items() if _is_end(plan.residual, name))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(artifact.shape(embedding)[0], _PROBE, generator=generator)
    expected = _logits(artifact, probe, "computing the original's logits", progress)
    actual = _logits(rotated, probe, "computing the rotated model's logits", progress)
    gap = (actual - expected).to(torch.float64)
    spread = expected.to(torch.float64).std(dim=-1).square().mean().sqrt()
    share, largest = float(gap.square().mean().sqrt() / spread), float(gap.abs().max())
    if not share <= tolerance:
        raise NumericsError(
            f"{artifact.name}, rotated, computes other logits: they differ by {share:.2g} of their "
            f"spread, where rounding to {', '.join(sorted(dtypes))} explains {tolerance:g}",
            "nothing was kept; the model is one that a rotation changes, or too fragile for one",
        )
    return share, largest


def _logits(artifact: Artifact, probe: Tensor, stage: str, progress: ProgressCallback) -> Tensor:
    """By a walk through the artifact from disk, in float32: one block is in memory at a time."""
    walk = Walk(artifact, probe, (), torch.float32, torch.device("cpu"))
    walk.start()
    for done in range(len(walk.names)):
        progress(Progress(stage, done, len(walk.names)))
        walk.load()
        walk.advance()
    return walk.probe_logits().float()
