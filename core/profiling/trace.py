"""A trace of a prefill and some decode steps, for chrome://tracing and ui.perfetto.dev."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as recorded

from infopt.core.files import write_atomically
from infopt.core.profiling.measure import Runner
from infopt.core.progress import Progress, ProgressCallback
from infopt.core.recipe.profile import ProfileSettings

STEPS = 4


def write_trace(
    runner: Runner,
    settings: ProfileSettings,
    context: int,
    file: Path,
    progress: ProgressCallback,
) -> None:
    """Every operator of one prefill and of `STEPS` decode steps, after a warm-up of each."""
    progress(Progress("trace", note=file.name))
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    runner.prefill(settings.batch, settings.prompt_tokens)
    with recorded(activities=activities) as trace:
        with record_function("prefill"):
            runner.prefill(settings.batch, settings.prompt_tokens)
        runner.prepare_decode(settings.batch, context)
        for _ in range(STEPS):
            with record_function("decode step"):
                runner.decode_step()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(raw))
        write_atomically(file, raw.read_text("utf-8"))
