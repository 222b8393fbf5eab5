"""Rotate a model before it is quantized, or instead."""

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.progress import ProgressCallback
from infopt.core.quantization.job import Job, resolve_job
from infopt.core.quantization.made import LayerCheckpoint, Made
from infopt.core.quantization.output import recipe_text
from infopt.core.quantization.rotate import rotate


def make_rotated(job: Job, checkpoint: LayerCheckpoint, progress: ProgressCallback) -> Made:
    """The rotated model itself, dense: it computes what the original does."""
    found = rotate(
        job.artifact,
        checkpoint.staging(),
        seed=job.settings.seed,
        progress=progress,
        extra={"recipe.yaml": recipe_text(job)},
    )
    warnings = _told(job.artifact, found.artifact)
    return Made(found.artifact, job, (), found.logits_max_difference, warnings=warnings)


def rotated_job(
    job: Job, checkpoint: LayerCheckpoint, progress: ProgressCallback
) -> tuple[Job, tuple[str, ...]]:
    """The same job on the rotated model, a stage that `resume` keeps; and what is to be told."""
    place = checkpoint.stage("rotated")
    if not place.exists():
        rotate(job.artifact, place, seed=job.settings.seed, progress=progress)
    rotated = read_artifact(place, name=job.artifact.name)
    return resolve_job(rotated, job.settings), _told(job.artifact, rotated)


def _told(original: Artifact, rotated: Artifact) -> tuple[str, ...]:
    if rotated.weight_bytes <= original.weight_bytes:
        return ()
    more = rotated.weight_bytes - original.weight_bytes
    return (
        "the head shared the embedding's weight; rotated, it has its own: "
        f"{more / 2**20:.0f} MiB more",
    )
