"""The weight of a linear layer, dense or quantized, as an artifact stores it.

Whether a layer is quantized is told by its tensors; what they mean, by `quantization_config`.
"""

import re

from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.artifact.schemes import (
    Table,
    gptq_version,
    kv_format_of,
    layer_scheme_of,
    layout_of,
)
from infopt.core.errors import ArtifactError
from infopt.core.formats.awq import from_awq
from infopt.core.formats.bitsandbytes import STATE, STATE_FP4, from_int8, from_nf4
from infopt.core.formats.compressed import from_compressed
from infopt.core.formats.fp8 import Fp8Format
from infopt.core.formats.fp8_block import from_fp8_block
from infopt.core.formats.gptq import from_gptq
from infopt.core.formats.layout import SUFFIXES
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import KvFormat, LayerScheme, Layout, StoredWeight

_PACKED = ("qweight", "weight_packed")
_STORED_DTYPES = frozenset({"int8", "float8_e4m3fn"})
_SUFFIXES = tuple(dict.fromkeys(suffix for suffixes in SUFFIXES.values() for suffix in suffixes))
_INPUT_SCALES = ("input_scale", "activation_scale")
# Scales of the KV cache, which belong to an attention and to no parameter of the model.
_SIDE = re.compile(r"\.[kv]_(scale|zero_point)$")


def is_quantized(artifact: Artifact, name: str) -> bool:
    """Whether the layer `name` is stored in fewer bits, told by its tensors."""
    if any(artifact.has(f"{name}.{suffix}") for suffix in _PACKED):
        return True
    weight = f"{name}.weight"
    if not artifact.has(weight):
        return False
    states = (f"{name}.{STATE}", f"{name}.{STATE_FP4}")
    return artifact.dtype(weight) in _STORED_DTYPES or any(map(artifact.has, states))


def is_side_tensor(name: str) -> bool:
    """Whether a stored tensor is a scale of the KV cache, which no parameter of a model takes."""
    return _SIDE.search(name) is not None


def linear_weight(artifact: Artifact, name: str) -> Tensor | StoredWeight:
    """The weight [N, K] of the layer `name`, such as 'model.layers.0.self_attn.q_proj'.

    Raises ArtifactError where tensors are missing or do not fit, UnsupportedError for a
    quantization that infopt cannot read.
    """
    if not is_quantized(artifact, name):
        return artifact.tensor(f"{name}.weight")
    table = _table(artifact, name)
    where = str(artifact.path)
    layout = layout_of(table, where)
    form = layer_scheme_of(table, name, where).weight
    tensors = {
        suffix: artifact.tensor(f"{name}.{suffix}")
        for suffix in SUFFIXES[layout]
        if artifact.has(f"{name}.{suffix}")
    }
    _check_stored(layout, form, tensors, f"{where} lacks {name}")
    match layout, form:
        case "gptq", IntegerFormat():
            return from_gptq(tensors, form, version=gptq_version(table, where), where=name)
        case "awq", IntegerFormat():
            return from_awq(tensors, form, name)
        case "compressed-tensors", IntegerFormat() | Fp8Format():
            return from_compressed(tensors, form, name)
        case "fp8", Fp8Format():
            return from_fp8_block(tensors, form, name)
        case "bitsandbytes", Nf4Format():
            return from_nf4(tensors, name)
        case "bitsandbytes", IntegerFormat():
            return from_int8(tensors, name)
    raise AssertionError(f"{layout} has no {form}")


def layer_scheme(artifact: Artifact, name: str) -> LayerScheme | None:
    """The number formats of the layer `name`; None where it is dense.

    Raises as `linear_weight` does; no tensor is read.
    """
    if not is_quantized(artifact, name):
        return None
    scheme = layer_scheme_of(_table(artifact, name), name, str(artifact.path))
    if isinstance(scheme.weight, Nf4Format):
        return LayerScheme(Nf4Format(artifact.has(f"{name}.weight.nested_absmax")))
    return scheme


def input_scale(artifact: Artifact, name: str) -> Tensor | None:
    """The calibrated scale [1] of the inputs of the layer `name`; None where it has none.

    Raises ArtifactError for a scale that is missing though the layer's scheme is static.
    """
    scheme = layer_scheme(artifact, name)
    if scheme is None or scheme.activation is None or scheme.activation.dynamic:
        return None
    for suffix in _INPUT_SCALES:
        if artifact.has(f"{name}.{suffix}"):
            scale = artifact.tensor(f"{name}.{suffix}")
            if scale.numel() != 1:
                raise ArtifactError(f"{artifact.path}: {name}.{suffix} has {scale.numel()} values")
            return scale.reshape(1)
    raise ArtifactError(f"{artifact.path} lacks {name}.{_INPUT_SCALES[0]}, its inputs' scale")


def kv_format(artifact: Artifact) -> KvFormat | None:
    """How the keys and values are to be cached; None where the artifact does not say."""
    table = artifact.quantization
    return None if table is None else kv_format_of(table, str(artifact.path))


def stored_names(artifact: Artifact, parameter: str) -> tuple[str, ...]:
    """The artifact's tensors that make up a parameter of the model; none where it is absent.

    The first holds the codes, or is the parameter itself.
    """
    layer = parameter.removesuffix(".weight")
    if layer != parameter and is_quantized(artifact, layer):
        names = [f"{layer}.{suffix}" for suffix in _SUFFIXES if artifact.has(f"{layer}.{suffix}")]
        first = [n for n in names if n.rpartition(".")[2] in (*_PACKED, "weight")]
        return (*first, *(name for name in names if name not in first))
    return (parameter,) if artifact.has(parameter) else ()


def _table(artifact: Artifact, name: str) -> Table:
    table = artifact.quantization
    if table is None:
        raise ArtifactError(
            f"{artifact.path} stores {name} quantized, but config.json has no quantization_config"
        )
    return table


def _check_stored(
    layout: Layout,
    form: IntegerFormat | Fp8Format | Nf4Format,
    tensors: dict[str, Tensor],
    lacks: str,
) -> None:
    """The tensors without which nothing can be read are there."""
    needed: dict[Layout, tuple[str, ...]] = {
        "gptq": ("qweight", "qzeros", "scales"),
        "awq": ("qweight", "qzeros", "scales"),
        "compressed-tensors": ("weight_scale",),
        "fp8": ("weight",),
        "bitsandbytes": ("weight", STATE if isinstance(form, Nf4Format) else "SCB"),
    }
    for suffix in needed[layout]:
        if suffix not in tensors:
            raise ArtifactError(f"{lacks}.{suffix}, which {layout} must have")
