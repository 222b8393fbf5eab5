"""transformers models from an artifact: whole, or as a skeleton that is filled part by part."""

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from infopt.core.artifact.quantized import is_quantized, is_side_tensor, linear_weight
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.models.conv1d import TransposedLinear, linearize, transposed_layout
from infopt.core.models.experts import unfuse
from infopt.core.models.inputs import round_inputs_as_stored
from infopt.core.models.kv_rounding import round_kv_as_stored
from infopt.core.models.sources import Source, find_source

_SHOWN = 3


def skeleton(artifact: Artifact, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in eval mode, its parameters on the meta device, its buffers real.

    Every Conv1D is a linear layer, and so is every projection of an expert that transformers fuses.
    Raises UnsupportedError where transformers knows no causal language model for the config,
    ArtifactError naming tensors that are missing or that the model has no place for.
    """
    try:
        config = AutoConfig.from_pretrained(artifact.path, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        linearize(model)
        unfuse(model)
    except (ValueError, KeyError, AttributeError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"{artifact.path / 'config.json'} is of no causal LM that transformers knows: {reason}"
        ) from error
    model = cast(PreTrainedModel, model.eval().requires_grad_(False))
    _check_names(model, artifact)
    return model


def load_transformers(
    artifact: Artifact, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The whole model in `dtype` on `device`; quantized layers are dequantized as they are read.

    Where the artifact says that inputs, or keys and values, are quantized, they are rounded so.
    """
    try:
        model = skeleton(artifact, dtype)
    except ArtifactError as error:
        # transformers knows how to convert some older layouts; a quantized one it must not touch.
        converted = None if artifact.quantization else _converted(artifact, dtype)
        if converted is None:
            raise error
        return converted.to(device)
    materialize(model, "", model, artifact, dtype, device)
    tie(model)
    round_inputs_as_stored(model, artifact, lambda name: resolve(model, artifact, name))
    round_kv_as_stored(model, artifact)
    return model


def _converted(artifact: Artifact, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model as transformers itself loads it; None if it would leave out or make up anything."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        artifact.path, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    if any(loading[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def materialize(
    model: PreTrainedModel,
    prefix: str,
    part: nn.Module,
    artifact: Artifact,
    dtype: torch.dtype,
    device: torch.device,
    *,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill the part of `model` named `prefix` ('' for all), one tensor at a time.

    Names that start with one of `skip` stay as they are. A shape that is not the model's raises
    ArtifactError naming the tensor.
    """
    for local, current in list(_stored(part)):
        name = f"{prefix}.{local}" if prefix else local
        if name.startswith(skip) or not (source := find_source(model, artifact, name)).names:
            continue
        value = _read(artifact, source, transposed=_is_transposed_weight(part, local))
        if value.shape != current.shape:
            raise ArtifactError(
                f"{artifact.path}: {source.names[0]} has the shape {list(value.shape)}, "
                f"but its config asks for {list(current.shape)}"
            )
        _put(part, local, value.to(device, dtype if value.is_floating_point() else None))
    for local, buffer in list(part.named_buffers()):
        name = f"{prefix}.{local}" if prefix else local
        if not name.startswith(skip):
            _put(part, local, buffer.to(device))


def tie(model: PreTrainedModel) -> None:
    """Let tied parameters share what was loaded for one of them (in the same device's memory)."""
    for target, source in _tied(model).items():
        pair = (model.get_parameter(target), model.get_parameter(source))
        if pair[0].is_meta != pair[1].is_meta:
            absent, present = (target, pair[1]) if pair[0].is_meta else (source, pair[0])
            owner, _, leaf = absent.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = present


def release(part: nn.Module) -> None:
    """Give back the memory of the parameters of `part`; buffers stay."""
    for local, parameter in list(part.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            _put(part, local, parameter.to("meta"))


def blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder's blocks and their names, in order: the longest list of modules in the model.

    Raises UnsupportedError for a model without one, or with blocks in pieces over several lists.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # A list within a list's member is of parts of a block, however many they are.
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{n}." for n in lists)):
            lists[name] = module
    if not lists:
        raise UnsupportedError(f"{type(model).__name__} has no list of blocks")
    name, found = max(lists.items(), key=lambda entry: len(entry[1]))
    pieces = [n for n in lists if n.rpartition(".")[0] == name.rpartition(".")[0]]
    pieces = [n for n in pieces if len(lists[n]) == len(found) and list(lists[n].parameters())]
    if len(pieces) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} has its blocks in pieces, in the lists {', '.join(pieces)}"
        )
    return [(f"{name}.{index}", block) for index, block in enumerate(found)]


def resolve(model: PreTrainedModel, artifact: Artifact, name: str) -> tuple[str, ...]:
    """The artifact's tensors for the model's parameter `name`; a fused one is of many parameters.

    Old checkpoints name the tensors of the base model without its prefix, others as transformers
    renames them when it loads.
    """
    return find_source(model, artifact, name).names


def stored_layer(model: PreTrainedModel, artifact: Artifact, layer: str) -> str:
    """The name of a layer in the artifact, and in one that is made from it.

    An expert that the artifact holds fused with others gets the name that it has in the model.
    """
    source = find_source(model, artifact, f"{layer}.weight")
    if not source.names or source.part is not None:
        return layer
    return source.names[0].rpartition(".")[0]


def _read(artifact: Artifact, source: Source, *, transposed: bool) -> Tensor:
    """A parameter's value; `transposed`: the weight of a layer that dense checkpoints transpose."""
    stored = source.names[0]
    layer = stored.rpartition(".")[0]
    if len(source.names) > 1 and is_quantized(artifact, layer):
        weight = linear_weight(artifact, layer)
        value = weight if isinstance(weight, Tensor) else weight.dequantize()
        return transposed_layout(value) if transposed else value
    value = artifact.tensor(stored)
    if source.part is not None:
        return source.part.cut(value)
    return value.T if transposed and value.ndim == 2 else value


def _is_transposed_weight(part: nn.Module, local: str) -> bool:
    owner, _, leaf = local.rpartition(".")
    return leaf == "weight" and isinstance(part.get_submodule(owner), TransposedLinear)


def _stored(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, as a checkpoint holds them; tied ones under each name."""
    parameters = dict(part.named_parameters(remove_duplicate=False))
    yield from parameters.items()
    for name in part.state_dict(keep_vars=True):
        if name not in parameters:
            yield name, part.get_buffer(name)


def _put(part: nn.Module, local: str, value: Tensor) -> None:
    owner_name, _, leaf = local.rpartition(".")
    owner = part.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _tied(model: PreTrainedModel) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _check_names(model: PreTrainedModel, artifact: Artifact) -> None:
    """Every parameter has its tensors, every tensor its parameter; ties and leftovers apart."""
    tied = _tied(model)
    used: set[str] = set()
    missing: list[str] = []
    for name, _ in _stored(model):
        found = resolve(model, artifact, name)
        used.update(found)
        partners = [tied.get(name), *(t for t, source in tied.items() if source == name)]
        partners += [t for t, source in tied.items() if source == tied.get(name)]
        if not found and not any(resolve(model, artifact, p) for p in partners if p):
            missing.append(name)
    ignored = _patterns(model)
    unexpected = [
        name
        for name in artifact.names()
        if name not in used
        and not is_side_tensor(name)
        and not any(pattern.search(name) for pattern in ignored)
    ]
    placeless = "has tensors that its config has no place for:"
    for names, fault in ((missing, "lacks"), (unexpected, placeless)):
        if names:
            rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ArtifactError(
                f"{artifact.path} {fault} {', '.join(names[:_SHOWN])}{rest}",
                "config.json and the weight files do not belong together, "
                "or the layout is one that infopt cannot map",
            )


def _patterns(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Tensors that old checkpoints hold and no model reads."""
    own: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [re.compile(pattern) for pattern in (r"rotary_emb\.inv_freq$", *own)]
