"""Checkpoints that the other tools wrote."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infopt.core.artifact.read import Artifact, read_artifact

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"


@pytest.fixture
def checkpoint() -> Callable[[str], Artifact]:
    """One of tests/fixtures/checkpoints, by its name."""
    return lambda name: read_artifact(CHECKPOINTS / name)
