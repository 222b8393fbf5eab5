"""What a conversion would do, need and take, before it is done (`--dry-run`)."""

from pathlib import Path

from infopt.core.artifact.read import Artifact
from infopt.core.conversion.source import Source, dense_dtype, look_through
from infopt.core.files import require_disk
from infopt.core.recipe.convert import ConvertSettings
from infopt.core.reports.schema import Plan

_PROCESS_BYTES = 600 * 2**20
"""Python, torch and transformers themselves."""
_PER_WEIGHT = 40
"""Bytes for each weight of the layer at hand: packing goes by 64-bit words, twice."""
_WEIGHTS_PER_SECOND = 2e7
"""Unpacked, packed, written, read back and compared: 106M of 4 bits took 4 to 7 s on two cores."""
_DISK_RESERVE = 1.05


def plan_convert(artifact: Artifact, settings: ConvertSettings) -> Plan:
    """Layers, memory, disk and time.

    An artifact that is not quantized stands for one that an earlier step of a recipe will write:
    of that only the size is known.
    """
    if artifact.quantization is None:
        return Plan(
            command="convert",
            actions=(f"re-pack the quantized layers as {settings.format}, and compare them",),
            memory_bytes=_PROCESS_BYTES + artifact.weight_bytes,
            disk_bytes=2 * artifact.weight_bytes,
        )
    source = look_through(artifact)
    weights = [layer.outputs * layer.inputs for layer in source.layers]
    kinds = dict.fromkeys(layer.scheme.describe() for layer in source.layers)
    to: str = settings.format
    if to == "dense":
        to += f" {str(dense_dtype(source, settings.dense_dtype)).removeprefix('torch.')}"
    return Plan(
        command="convert",
        actions=(
            f"re-pack {len(weights)} layers ({'; '.join(kinds)}) from {source.layout} to {to}",
            "read every layer back and compare it with what it was",
        ),
        memory_bytes=_PROCESS_BYTES + _PER_WEIGHT * max(weights),
        disk_bytes=_disk(source, settings),
        seconds=sum(weights) / _WEIGHTS_PER_SECOND,
    )


def check_disk(source: Source, settings: ConvertSettings, output: Path) -> None:
    """Raise ResourceError where the disk has no room for the artifact."""
    require_disk(
        output, _disk(source, settings) * _DISK_RESERVE, f"converting {source.artifact.name}"
    )


def _disk(source: Source, settings: ConvertSettings) -> int:
    """The artifact twice: the writer spools a shard before it copies it into place."""
    kept = sum(source.artifact.headers[name].nbytes for name in source.kept)
    if settings.format == "dense":
        width = dense_dtype(source, settings.dense_dtype).itemsize
        made = float(sum(layer.outputs * layer.inputs * width for layer in source.layers))
    else:
        made = sum(layer.bytes for layer in source.layers)
    return int(2 * (kept + made))
