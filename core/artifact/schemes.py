"""What a `quantization_config` says of a layer: its number formats, whoever wrote the table.

Each function takes the table and a layer's name and reads only what that layer needs. Words that
infopt cannot honour raise UnsupportedError, naming the place `where` the table was found.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.formats.activation import ActivationFormat
from infopt.core.formats.fp8 import BLOCK, Fp8Format
from infopt.core.formats.nf4 import Nf4Format
from infopt.core.formats.number import IntegerFormat
from infopt.core.formats.scheme import KvFormat, LayerScheme, Layout

Table = Mapping[str, Any]

_METHODS: dict[str, Layout] = {
    "gptq": "gptq",
    "auto_gptq": "gptq",
    "auto-gptq": "gptq",
    "gptqmodel": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "bitsandbytes": "bitsandbytes",
}
_VERSIONS = {"gptq": 1, "gptq_v2": 2}
_PLAIN = frozenset(
    {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"}
)
_LITERAL = re.compile(r"\^(?:[\w-]|\\\W)*\$")


def layout_of(table: Table, where: str) -> Layout:
    """The checkpoint format, by `quant_method`; a table without one is AutoGPTQ's."""
    method = table.get("quant_method") or table.get("method") or "gptq"
    found = _METHODS.get(str(method).lower())
    if found is None:
        raise UnsupportedError(
            f"{where} is quantized by {method!r}, which infopt cannot read",
            f"known: {', '.join(dict.fromkeys(_METHODS.values()))}",
        )
    return found


def layer_scheme_of(table: Table, layer: str, where: str) -> LayerScheme:
    """The number formats of a layer that is known to be stored quantized.

    Of bitsandbytes' NF4 the table does not say for each layer whether it is doubly quantized.
    """
    match layout_of(table, where):
        case "gptq":
            return LayerScheme(_gptq(table, layer, where))
        case "awq":
            return LayerScheme(_awq(table, where))
        case "compressed-tensors":
            return _compressed(table, layer, where)
        case "fp8":
            return _fp8(table, where)
        case "bitsandbytes":
            return _bitsandbytes(table, where)


def gptq_version(table: Table, where: str) -> int:
    """1 where zeros are stored minus one, 2 where they are stored as they are."""
    label = table.get("checkpoint_format") or table.get("format") or "gptq"
    if label not in _VERSIONS:
        raise UnsupportedError(
            f"{where} has the checkpoint_format {label!r}", f"known: {', '.join(_VERSIONS)}"
        )
    return _VERSIONS[label]


def kv_format_of(table: Table, where: str) -> KvFormat | None:
    """How keys and values are to be cached; scales lie beside the weights of each layer."""
    scheme = table.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping):
        return None
    kinds: dict[Any, KvFormat] = {"int": "int8", "float": "fp8"}
    kind = kinds.get(scheme.get("type", "int"))
    plain = scheme.get("symmetric", True) and not scheme.get("dynamic", False)
    if (
        kind is None
        or not plain
        or scheme.get("num_bits") != 8
        or scheme.get("strategy") not in (None, "tensor")
    ):
        raise UnsupportedError(
            f"{where} has a kv_cache_scheme that infopt cannot read",
            "known: 8 bits, int or float, symmetric, one static scale for keys and one for values",
        )
    return kind


def _gptq(table: Table, layer: str, where: str) -> IntegerFormat:
    changes = _override(table.get("dynamic"), layer, where)
    said = {key: changes.get(key, table.get(key)) for key in ("bits", "group_size", "sym")}
    return _integers(said["bits"], said["group_size"], said["sym"] is not False, where)


def _override(dynamic: Any, layer: str, where: str) -> Table:
    """What GPTQModel's `dynamic` changes for a layer: the first pattern that matches its name."""
    if not isinstance(dynamic, Mapping):
        return {}
    literal = f"^{re.escape(layer)}$"
    for pattern, changes in dynamic.items():
        body = str(pattern).removeprefix("+:")
        if body.startswith("-:") or not isinstance(changes, Mapping):
            continue
        # Names written out are compared as strings: there may be thousands of them.
        if body == literal or (not _LITERAL.fullmatch(body) and _matches(body, layer, where)):
            return changes
    return {}


def _matches(pattern: str, layer: str, where: str) -> bool:
    try:
        return re.match(pattern, layer) is not None
    except re.error as error:
        raise ArtifactError(f"{where} has the pattern {pattern!r}: {error}") from None


def _awq(table: Table, where: str) -> IntegerFormat:
    version = str(table.get("version") or table.get("format") or "gemm").lower()
    if version != "gemm" or table.get("bits", 4) != 4:
        raise UnsupportedError(
            f"{where} is AWQ of version {version!r} with {table.get('bits')} bits",
            "known: gemm, 4 bits",
        )
    symmetric = table.get("zero_point", True) is False
    return _integers(4, table.get("group_size", 128), symmetric, where)


def _integers(bits: Any, group_size: Any, symmetric: bool, where: str) -> IntegerFormat:
    size = -1 if group_size is None else group_size
    if bits not in (2, 3, 4, 8) or type(size) is not int:
        raise UnsupportedError(
            f"{where} says bits {bits!r} and group_size {group_size!r}",
            "known: 2, 3, 4 or 8 bits; -1 or a number of columns",
        )
    return IntegerFormat(bits, symmetric, size if size > 0 else None)


def _compressed(table: Table, layer: str, where: str) -> LayerScheme:
    group = _group(table, layer, where)
    stored = group.get("format") or table.get("format")
    sparsity = table.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        stored = sparsity["format"]
    if stored not in _PLAIN:
        raise UnsupportedError(
            f"{where} is stored as {stored!r} of compressed-tensors, which infopt cannot read",
            f"known: {', '.join(sorted(_PLAIN))}",
        )
    if table.get("transform_config"):
        raise UnsupportedError(f"{where} transforms activations at run time (transform_config)")
    if group.get("output_activations"):
        raise UnsupportedError(f"{where} rounds the outputs of {layer} (output_activations)")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise ArtifactError(f"{where} has a config group for {layer} without weights")
    activation = _activation(inputs, where) if isinstance(inputs, Mapping) else None
    return LayerScheme(_compressed_weight(weights, where), activation)


def _group(table: Table, layer: str, where: str) -> Table:
    """The config group of a layer: by its name, by a pattern, else by the class of its module.

    Of a stored layer only the name is known; a bare word among the targets is taken for a class.
    """
    found = table.get("config_groups")
    said = found.values() if isinstance(found, Mapping) else ()
    groups = [group for group in said if isinstance(group, Mapping)]
    for group in groups:  # there may be thousands of names, and this is asked for each of them
        if layer in group.get("targets", ()):
            return group
    targets = [(str(target), group) for group in groups for target in group.get("targets", ())]
    for target, group in targets:
        if target.startswith("re:") and _matches(target.removeprefix("re:"), layer, where):
            return group
    for word in ("Linear", None):
        for target, group in targets:
            if target == word or (word is None and target.isidentifier()):
                return group
    raise ArtifactError(f"{where} has no config group for {layer}, which is stored quantized")


def _compressed_weight(said: Table, where: str) -> IntegerFormat | Fp8Format:
    bits, kind, size = said.get("num_bits", 8), said.get("type", "int"), said.get("group_size")
    strategy: Any = said.get("strategy") or _strategy(size)
    symmetric = bool(said.get("symmetric", True))
    if kind == "int" and bits in (4, 8) and strategy in ("tensor", "channel", "group"):
        return _integers(bits, size if strategy == "group" else None, symmetric, where)
    if kind == "float" and bits == 8 and symmetric and strategy in ("tensor", "channel", "block"):
        if strategy == "block" and said.get("block_structure") not in (list(BLOCK), "128x128"):
            raise UnsupportedError(
                f"{where} has float8 blocks of {said.get('block_structure')}", "known: 128 x 128"
            )
        return Fp8Format(strategy)
    raise UnsupportedError(
        f"{where} has {bits}-bit {kind} weights by {strategy}, which infopt cannot read",
        "known: int of 4 or 8 bits by group, channel or tensor; float of 8 by channel, tensor or "
        "block",
    )


def _strategy(group_size: Any) -> str:
    if type(group_size) is not int:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _activation(said: Table, where: str) -> ActivationFormat:
    bits, kind, dynamic = said.get("num_bits", 8), said.get("type", "int"), said.get("dynamic")
    size = said.get("group_size")
    strategy: Any = said.get("strategy") or _strategy(size)
    fits = bits == 8 or (bits == 4 and kind == "int")
    static = not dynamic and strategy == "tensor"
    moving = dynamic is True and strategy in ("tensor", "token", "group")
    if not fits or kind not in ("int", "float") or not (static or moving):
        raise UnsupportedError(
            f"{where} rounds inputs to {bits}-bit {kind} by {strategy}, which infopt cannot",
            "known: int of 4 or 8 bits and float of 8, dynamic by token, tensor or group, or "
            "static by tensor",
        )
    if not said.get("symmetric", True):
        raise UnsupportedError(f"{where} rounds inputs asymmetrically, which infopt cannot")
    group_size = size if strategy == "group" else None
    return ActivationFormat(kind, bits, strategy, bool(dynamic), group_size)


def _fp8(table: Table, where: str) -> LayerScheme:
    size = table.get("weight_block_size")
    static = str(table.get("activation_scheme", "dynamic")).lower() == "static"
    if size is None:
        form = ActivationFormat("float", 8, "tensor", dynamic=not static)
        return LayerScheme(Fp8Format("tensor"), form)
    if list(size) != list(BLOCK) or static:
        raise UnsupportedError(
            f"{where} has float8 blocks of {size}{' and static inputs' if static else ''}",
            f"known: {BLOCK[0]} x {BLOCK[1]} and dynamic inputs",
        )
    return LayerScheme(Fp8Format("block"), ActivationFormat("float", 8, "group", True, BLOCK[1]))


def _bitsandbytes(table: Table, where: str) -> LayerScheme:
    if table.get("load_in_4bit") or table.get("_load_in_4bit"):
        kind = table.get("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            raise UnsupportedError(
                f"{where} has {kind} weights of bitsandbytes, which infopt cannot read",
                "known: nf4, and 8 bits",
            )
        return LayerScheme(Nf4Format(bool(table.get("bnb_4bit_use_double_quant", False))))
    # A threshold of 0 says that nothing is an outlier.
    threshold = float(table.get("llm_int8_threshold", 6.0)) or math.inf
    form = ActivationFormat("int", 8, "token", outlier_threshold=threshold)
    return LayerScheme(IntegerFormat(8, True, None), form)
