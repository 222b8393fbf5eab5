"""The quantized artifact: its tensors, its configs, and the proof that it is what was computed."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.tables import quantization_table
from infopt.core.artifact.write import write_artifact
from infopt.core.quantization.job import Job
from infopt.core.quantization.made import LayerCheckpoint
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe


def stage_artifact(job: Job, checkpoint: LayerCheckpoint) -> Artifact:
    """Write the quantized artifact into the folder of the unfinished work."""
    config = _config(job)
    extra = {"recipe.yaml": recipe_text(job)}
    if job.settings.format in ("gptq", "awq"):
        table = config["quantization_config"]
        extra["quantize_config.json"] = json.dumps(table, indent=2) + "\n"
    return write_artifact(
        checkpoint.staging(),
        source=job.artifact,
        tensors=_tensors(job, checkpoint),
        config=config,
        extra=extra,
    )


def recipe_text(job: Job) -> str:
    """The recipe that makes this artifact again; where hidden states were kept is no part of it."""
    settings = job.settings.model_copy(update={"offload": "auto"})
    step = Step(verb="quantize", settings=settings)
    return dump_recipe(Recipe(name="quantize", steps=(step,)))


def _config(job: Job) -> dict[str, Any]:
    """The model's config, and of what its weights are."""
    layout = job.settings.format
    if layout is None:
        return job.artifact.config
    names = {target: stored.removesuffix(".weight") for stored, target in job.stored.items()}
    table = quantization_table(
        layout,
        {names[target]: scheme for target, scheme in job.schemes.items()},
        job.ignored,
        kv=job.settings.kv_cache,
        meta=_meta(job.settings),
    )
    return {**job.artifact.config, "quantization_config": table}


def _meta(settings: QuantizeSettings) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "quantizer": [f"infopt:{version('infopt')}"],
        "algorithm": settings.method,
        "rounding": settings.how,
        "grid": settings.grid,
    }
    if settings.how == "gptq":
        meta |= {
            "damp_percent": settings.damp_percent,
            "act_order": settings.act_order,
            "static_groups": settings.act_order,
            "true_sequential": settings.true_sequential,
        }
    return meta


def _tensors(job: Job, checkpoint: LayerCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new artifact, one at a time: dense ones as they were stored."""
    made = set(checkpoint.names())
    replaced = set(job.stored) if job.schemes else set()
    kept = {name for name in job.artifact.names() if name not in made and name not in replaced}
    for name in sorted(made | kept):
        yield name, checkpoint.tensor(name) if name in made else job.artifact.tensor(name)
