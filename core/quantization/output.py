"""The quantized artifact: its tensors, its configs, and the proof that it is what was computed."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.write import write_artifact
from infopt.core.compression.walk import Walk
from infopt.core.errors import NumericsError
from infopt.core.files import directory_atomically
from infopt.core.formats.gptq import SUFFIXES
from infopt.core.quantization.checkpoint import Checkpoint
from infopt.core.quantization.job import Job
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe

TOLERANCE = 1e-4
"""Largest difference of a logit; the same arithmetic on the same weights leaves none."""


def stage_artifact(job: Job, checkpoint: Checkpoint) -> Artifact:
    """Write the quantized artifact into the folder of the unfinished work."""
    table = quantization_table(job)
    recipe = Recipe(name="quantize", steps=(Step(verb="quantize", settings=job.settings),))
    return write_artifact(
        checkpoint.staging(),
        source=job.artifact,
        tensors=_tensors(job, checkpoint),
        config={**job.artifact.config, "quantization_config": table},
        extra={
            "quantize_config.json": json.dumps(table, indent=2) + "\n",
            "recipe.yaml": dump_recipe(recipe),
        },
    )


def publish(staged: Artifact, output: Path, *, replace: bool) -> Artifact:
    """Give the staged artifact its name; the files are moved, not copied."""
    with directory_atomically(output, replace=replace) as folder:
        for file in sorted(staged.path.iterdir()):
            file.rename(folder / file.name)
    return read_artifact(output)


def compare_with_disk(job: Job, staged: Artifact, probe: Tensor, expected: Tensor) -> float:
    """The largest difference of the probe's logits, by a walk through the artifact from disk.

    Raises NumericsError if it exceeds TOLERANCE. One block is in memory at a time.
    """
    walk = Walk(staged, probe, (), job.dtype, job.device)
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


def quantization_table(job: Job) -> dict[str, Any]:
    """`quantization_config` as gptqmodel, vLLM and SGLang read it.

    Static groups lie in order, so desc_act is false: no loader needs g_idx.
    """
    settings = job.settings
    meta: dict[str, Any] = {
        "quantizer": [f"infopt:{version('infopt')}"],
        "algorithm": settings.method,
        "grid": settings.grid,
    }
    if settings.method == "gptq":
        meta |= {
            "damp_percent": settings.damp_percent,
            "act_order": settings.act_order,
            "static_groups": settings.act_order,
            "true_sequential": settings.true_sequential,
        }
    table: dict[str, Any] = {
        "bits": settings.bits,
        "group_size": job.number_format.group_size or -1,
        "desc_act": False,
        "sym": settings.symmetric,
        "lm_head": False,
        "quant_method": "gptq",
        "method": "gptq",
        "format": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": meta,
    }
    if job.ignored:
        # What must not be taken for quantized: gptqmodel, vLLM and SGLang look into the first,
        # transformers (optimum) into the second.
        table["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in job.ignored}
        table["modules_in_block_to_quantize"] = [[target.name for target in job.targets]]
    return table


def _tensors(job: Job, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new artifact, one at a time: dense ones as they were stored."""
    for name in job.artifact.names():
        target = job.stored.get(name)
        if target is None:
            yield name, job.artifact.tensor(name)
            continue
        for suffix in SUFFIXES:
            stem = name.removesuffix("weight")
            yield f"{stem}{suffix}", checkpoint.tensor(f"{target}.{suffix}")
