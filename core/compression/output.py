"""How a compressed artifact takes its name, and the proof that it is what was computed."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError
from infopt.core.files import directory_atomically

TOLERANCE = 1e-4
"""Largest difference of a logit; the same arithmetic on the same weights leaves none."""


def publish(staged: Artifact, output: Path, *, replace: bool) -> Artifact:
    """Give the staged artifact its name; what was staged stays whole until the work is discarded.

    Files are linked, not copied, where the file system can.
    """
    with directory_atomically(output, replace=replace) as folder:
        for file in sorted(staged.path.iterdir()):
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)
    return read_artifact(output)


def compare_with_disk(
    staged: Artifact, probe: Tensor, expected: Tensor, dtype: torch.dtype, device: torch.device
) -> float:
    """The largest difference of the probe's logits, by a walk through the artifact from disk.

    Raises NumericsError if it exceeds TOLERANCE. One block is in memory at a time.
    """
    walk = Walk(staged, probe, (), dtype, device)
    walk.start()
    for _ in walk.names:
        walk.load()
        walk.advance()
    difference = float((walk.probe_logits().float() - expected.float()).abs().max())
    if not difference <= TOLERANCE:
        raise NumericsError(
            "the artifact read back from disk computes other logits than its weights did in "
            f"memory: they differ by {difference:.3g}",
            "this is a bug of infopt or a fault of the machine; nothing was kept of the artifact",
        )
    return difference
