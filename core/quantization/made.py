"""What a way of quantizing hands back to the door."""

from dataclasses import dataclass

from infopt.core.artifact.read import Artifact
from infopt.core.compression.checkpoint import Checkpoint
from infopt.core.quantization.job import Job
from infopt.core.reports.quantize import Allocation, LayerError

PROBE_TOKENS = 64
"""Of the calibration text: the artifact's logits on these are compared before it is done."""


LayerCheckpoint = Checkpoint[LayerError]


@dataclass(frozen=True, slots=True)
class Made:
    """A staged artifact that was compared with what was computed, and what is told of it."""

    staged: Artifact
    job: Job
    rows: tuple[LayerError, ...]
    difference: float
    allocation: Allocation | None = None
    warnings: tuple[str, ...] = ()
