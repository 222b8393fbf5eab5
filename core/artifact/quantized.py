"""The weight of a linear layer, dense or quantized, as an artifact stores it."""

from typing import Any

from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.gptq import SUFFIXES, from_gptq
from infopt.core.formats.number import IntegerFormat, QuantizedWeight

_BITS = (2, 3, 4, 8)


def is_quantized(artifact: Artifact, name: str) -> bool:
    """Whether the layer `name` is stored as integer codes."""
    return artifact.has(f"{name}.qweight")


def linear_weight(artifact: Artifact, name: str) -> Tensor | QuantizedWeight:
    """The weight [N, K] of the layer `name`, such as 'model.layers.0.self_attn.q_proj'.

    Raises ArtifactError where tensors are missing or do not fit, UnsupportedError for a
    quantization method that infopt cannot read.
    """
    if not is_quantized(artifact, name):
        return artifact.tensor(f"{name}.weight")
    table = artifact.quantization
    if table is None:
        raise ArtifactError(
            f"{artifact.path} has {name}.qweight, but no quantization_config in config.json"
        )
    number_format, version = _gptq_format(artifact, table)
    stored = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES}
    tensors = {
        suffix: artifact.tensor(full)
        for suffix, full in stored.items()
        if suffix != "g_idx" or artifact.has(full)
    }
    return from_gptq(tensors, number_format, version=version, where=name)


def stored_names(artifact: Artifact, parameter: str) -> tuple[str, ...]:
    """The artifact's tensors that make up a parameter of the model; none where it is absent."""
    if artifact.has(parameter):
        return (parameter,)
    layer = parameter.removesuffix(".weight")
    if layer != parameter and is_quantized(artifact, layer):
        names = (f"{layer}.{suffix}" for suffix in SUFFIXES)
        return tuple(name for name in names if artifact.has(name))
    return ()


def _gptq_format(artifact: Artifact, table: dict[str, Any]) -> tuple[IntegerFormat, int]:
    method = table.get("quant_method", "gptq")
    if method != "gptq":
        raise UnsupportedError(
            f"{artifact.path} is quantized by {method!r}, which infopt cannot read yet",
            "known: gptq",
        )
    bits, group_size = table.get("bits"), table.get("group_size", -1)
    if bits not in _BITS or not isinstance(group_size, int):
        raise UnsupportedError(
            f"{artifact.path} says bits {bits!r} and group_size {group_size!r}",
            "known: 2, 3, 4 or 8 bits; -1 or a number of columns",
        )
    label = table.get("checkpoint_format") or table.get("format") or "gptq"
    versions = {"gptq": 1, "gptq_v2": 2}
    if label not in versions:
        raise UnsupportedError(
            f"{artifact.path} has the checkpoint_format {label!r}", f"known: {', '.join(versions)}"
        )
    number_format = IntegerFormat(
        bits,
        symmetric=bool(table.get("sym", True)),
        group_size=group_size if group_size > 0 else None,
    )
    return number_format, versions[label]
