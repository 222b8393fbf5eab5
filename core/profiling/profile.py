"""Profile a model: what it needs by arithmetic, what the runtime reaches against this device's peaks."""

from dataclasses import dataclass
from typing import Protocol

from infopt.core.artifact.read import Artifact
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.hardware.probe import Machine, probe
from infopt.core.models.config import ModelConfig
from infopt.core.profiling.static import static_profile
from infopt.core.profiling.timer import Times, repeat
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.recipe.serve import EngineSettings
from infopt.core.reports.profile import (
    MeasuredPhase,
    Peaks,
    PhaseCost,
    ProfileReport,
    StaticProfile,
)
from infopt.core.reports.schema import Origin, Plan

# Bytes for the interpreter, the libraries and the allocator: assumed.
_RESERVE = {"cpu": 512 * 2**20, "cuda": 3_500_000_000}
_DECODE_WARMUP = 3
_PREFILL_WARMUP = 1
