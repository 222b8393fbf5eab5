"""The door: re-pack a quantized artifact into another checkpoint format."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infopt.core.artifact.quantized import kv_format
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.artifact.tables import quantization_table
from infopt.core.artifact.write import keep_the_source, write_artifact
from infopt.core.conversion.plan import check_disk
from infopt.core.conversion.repack import dequantized, difference, refusal, repacked
from infopt.core.conversion.source import (
    Source,
    dense_dtype,
    has_scattered_groups,
    look_through,
    side_tensors,
)
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.files import check_output, directory_atomically
from infopt.core.hardware.probe import peak_memory
from infopt.core.progress import Progress, ProgressCallback, silent
from infopt.core.recipe.convert import ConvertSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe
from infopt.core.reports.convert import ConvertReport
from infopt.core.reports.schema import Origin

_PROVENANCE: dict[str, Origin] = {
    "model": "measured",
    "layers": "measured",
    "schemes": "measured",
    "exact": "measured",
    "largest_difference": "measured",
    "bytes": "measured",
    "original_bytes": "measured",
    "seconds": "measured",
    "peak_memory_bytes": "measured",
}
_STAGED = "staged"


def convert(
    artifact: Artifact,
    output: Path,
    settings: ConvertSettings,
    *,
    replace: bool = False,
    progress: ProgressCallback = silent,
) -> ConvertReport:
    """Write the same weights in another checkpoint format to `output`, layer by layer.

    Before the output takes its name every layer is read back and compared with what it was: equal
    to the last bit of float32, except in dense weights of 16 bits, which are rounded and whose
    difference the report tells. The report's `made` is for the caller. Raises UsageError (not
    quantized, output), UnsupportedError (the format cannot hold a layer: which, and why),
    NumericsError (what was read back differs), ResourceError (disk).
    """
    started = time.monotonic()
    output = output.expanduser().absolute()
    keep_the_source(output, artifact)
    check_output(output, replace=replace)
    source = look_through(artifact)
    check_convertible(source, settings)
    check_disk(source, settings, output)
    config = _config(source, settings)
    with directory_atomically(output, replace=replace) as folder:
        staged = write_artifact(
            folder / _STAGED,
            source=artifact,
            tensors=_tensors(source, settings, progress),
            config=config,
            extra=_extra(config, settings),
        )
        largest = _compare(source, staged, settings, progress)
        for file in sorted(staged.path.iterdir()):
            file.rename(folder / file.name)
        staged.path.rmdir()
    written = read_artifact(output, trust_remote_code=artifact.trust_remote_code)
    dense = settings.format == "dense"
    return ConvertReport(
        model=artifact.summary(),
        provenance=_PROVENANCE,
        warnings=_warnings(source, settings, largest),
        output=str(output),
        source_format=source.layout,
        format=settings.format,
        dtype=_word(dense_dtype(source, settings.dense_dtype)) if dense else None,
        layers=len(source.layers),
        schemes=dict(Counter(layer.scheme.describe() for layer in source.layers)),
        exact=largest == 0.0,
        largest_difference=largest,
        bytes=written.weight_bytes,
        original_bytes=artifact.weight_bytes,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory(),
    )


def check_convertible(source: Source, settings: ConvertSettings) -> None:
    """Raise UnsupportedError naming the layers that the format cannot hold, and why.

    What only the values tell (a zero of 0, scales beyond float16) is told when they are read.
    """
    if settings.format == "dense":
        return
    refused = [
        (layer.name, reason)
        for layer in source.layers
        if (
            reason := refusal(
                settings.format,
                layer.scheme,
                layer.outputs,
                layer.inputs,
                transposed=layer.transposed,
            )
        )
    ]
    if refused:
        name, reason = refused[0]
        others = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        raise UnsupportedError(
            f"the {settings.format} format cannot hold {name}{others}: {reason}",
            "choose another --format; dense takes every one",
        )
    if settings.format != "gptq" and has_scattered_groups(source):
        raise UnsupportedError(
            f"the {settings.format} format has no place for groups of scattered columns: the "
            "artifact has act-order with its g_idx unsorted",
            "gptq has; so does dense",
        )
    _config(source, settings)  # its refusals: several schemes, scales of the KV cache


def _config(source: Source, settings: ConvertSettings) -> dict[str, Any]:
    config = {k: v for k, v in source.artifact.config.items() if k != "quantization_config"}
    if settings.format == "dense":
        config.pop("torch_dtype", None)
        return config | {"dtype": _word(dense_dtype(source, settings.dense_dtype))}
    table = quantization_table(
        settings.format,
        {layer.name: layer.scheme for layer in source.layers},
        source.ignored,
        kv=source.kv,
        meta={
            "converter": [f"infopt:{version('infopt')}"],
            "converted_from": source.layout,
            **_made_by(source),
        },
        dtype=source.dtype,
    )
    if settings.format == "gptq" and has_scattered_groups(source):
        table["desc_act"] = True
    return config | {"quantization_config": table}


def _made_by(source: Source) -> dict[str, Any]:
    """Who quantized the weights, as far as the source says."""
    meta = (source.artifact.quantization or {}).get("meta")
    keys = ("quantizer", "algorithm", "rounding", "grid")
    return {key: meta[key] for key in keys if key in meta} if isinstance(meta, dict) else {}


def _extra(config: dict[str, Any], settings: ConvertSettings) -> dict[str, str]:
    recipe = Recipe(name="convert", steps=(Step(verb="convert", settings=settings),))
    extra = {"recipe.yaml": dump_recipe(recipe)}
    if settings.format in ("gptq", "awq"):
        table = config["quantization_config"]
        extra["quantize_config.json"] = json.dumps(table, indent=2) + "\n"
    return extra


def _tensors(
    source: Source, settings: ConvertSettings, progress: ProgressCallback
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new artifact; one layer is in memory at a time."""
    for name in source.kept:
        if settings.format == "dense" and name in side_tensors(source):
            continue
        yield name, source.artifact.tensor(name)
    for index, layer in enumerate(source.layers):
        progress(Progress("re-packing", index, len(source.layers), layer.name))
        if settings.format == "dense":
            dtype = dense_dtype(source, settings.dense_dtype)
            made = dequantized(source.artifact, layer.name, dtype, transposed=layer.transposed)
        else:
            made = repacked(source.artifact, layer.name, settings.format)
        yield from made.items()


def _compare(
    source: Source, written: Artifact, settings: ConvertSettings, progress: ProgressCallback
) -> float:
    """The largest difference of a weight as read back from what it was.

    Raises NumericsError where there is one that the request does not allow.
    """
    rounds = (
        settings.format == "dense" and dense_dtype(source, settings.dense_dtype) != torch.float32
    )
    if settings.format != "dense" and kv_format(written) != source.kv:
        raise NumericsError("the format of the KV cache is not what it was", _BUG)
    largest = 0.0
    for index, layer in enumerate(source.layers):
        progress(Progress("comparing with what was written", index, len(source.layers)))
        found = difference(source.artifact, written, layer.name, transposed=layer.transposed)
        if not found <= 0.0 and not rounds:
            raise NumericsError(
                f"{layer.name} read back from disk differs by {found:.3g} from what it was", _BUG
            )
        largest = max(largest, found)
    return largest


_BUG = "this is a bug of infopt or a fault of the machine; nothing was kept of the artifact"


def _warnings(source: Source, settings: ConvertSettings, largest: float) -> tuple[str, ...]:
    """What a dense checkpoint cannot say."""
    if settings.format != "dense":
        return ()
    found: list[str] = []
    if largest > 0:
        word = _word(dense_dtype(source, settings.dense_dtype))
        found.append(
            f"weights were rounded to {word}, by at most {largest:.3g}; --dtype float32 is exact"
        )
    rounding = sum(layer.scheme.activation is not None for layer in source.layers)
    if rounding:
        found.append(f"{rounding} layers round their inputs, which a dense checkpoint does not say")
    if source.kv is not None:
        found.append("the scales of the KV cache were left out: a dense checkpoint has none")
    return tuple(found)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
