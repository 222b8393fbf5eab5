"""Which of an artifact's tensors a model's parameter is made of.

transformers renames some checkpoints' tensors as it loads them, and merges experts. What it would
rename is looked up under the name that is stored; other conversions have no source here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from infopt.core.artifact.quantized import stored_names
from infopt.core.artifact.read import Artifact
from infopt.core.models.experts import Experts, FusedPart, experts_around

_NAMES = "_infopt_stored_names"


@dataclass(frozen=True, slots=True)
class Source:
    """The artifact's tensors for a parameter; of a fused one, the `part` that is meant."""

    names: tuple[str, ...]
    part: FusedPart | None = None


def find_source(model: PreTrainedModel, artifact: Artifact, name: str) -> Source:
    """Where the artifact holds the model's parameter `name`; no names where it does not."""
    stored = _stored_name(model, artifact, name)
    if stored and (found := stored_names(artifact, stored)):
        return Source(found)
    around = experts_around(model, name)
    if around is not None:
        owner, experts = around
        part = experts.fused_part(name.removeprefix(f"{owner}."))
        fused = _stored_name(model, artifact, f"{owner}.{part.name}")
        if fused and artifact.has(fused):
            return Source((fused,), part)
    return Source(())


def _stored_name(model: PreTrainedModel, artifact: Artifact, name: str) -> str | None:
    """Old checkpoints name the tensors of the base model without its prefix."""
    renamed = _renamed(model, artifact)
    if renamed is not None:
        return renamed.get(name)
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return name if short == name or stored_names(artifact, name) else short


def _renamed(model: PreTrainedModel, artifact: Artifact) -> Mapping[str, str] | None:
    """The model's names to the artifact's; None where transformers renames nothing.

    Looking through all names takes a while: what was found is kept with the model.
    """
    known = vars(model).get(_NAMES)
    if known is None or known[0] is not artifact:
        known = (artifact, _look_up(model, artifact))
        vars(model)[_NAMES] = known
    found: Mapping[str, str] | None = known[1]
    return found


def _look_up(model: PreTrainedModel, artifact: Artifact) -> Mapping[str, str] | None:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    own = set(_own_names(model))
    base = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    changed = False
    for stored in _parameters(artifact.names()):
        name = stored
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        converted = _converted_name(converters, name)
        if converted is None:
            changed = True
            continue
        if converted not in own and f"{base}{converted}" in own:
            converted = f"{base}{converted}"
        changed = changed or converted not in (stored, f"{base}{stored}")
        # A name that needs no change wins: a checkpoint may hold both spellings.
        if converted not in found or converted == stored:
            found[converted] = stored
    return found if changed else None


def _converted_name(converters: Iterable[WeightConverter], name: str) -> str | None:
    """The name after conversion; None where that is more than merging experts."""
    for converter in converters:
        fused, pattern = converter.rename_source_key(name)
        if pattern is None:
            continue
        sources = converter.source_patterns
        kinds = [type(operation) for operation in converter.operations]
        merged = [MergeModulelist] if len(sources) == 1 else [MergeModulelist, Concatenate]
        if kinds != merged or len(sources) > 2:
            return None
        number = re.search(pattern.replace("*.", r"(\d+)\.") + "$", name)
        if number is None:
            return name  # a part of a quantized weight, such as weight_scale
        owner, _, leaf = fused.rpartition(".")
        projection = leaf if len(sources) == 1 else ("gate_proj", "up_proj")[sources.index(pattern)]
        return f"{owner}.{number[1]}.{projection}.weight"
    return name


def _parameters(names: Iterable[str]) -> Iterator[str]:
    """The stored names, and the weights' names of what may be parts of quantized ones."""
    seen = set(names)
    yield from sorted(seen)
    yield from sorted({f"{name.rpartition('.')[0]}.weight" for name in seen} - seen)


def _own_names(model: PreTrainedModel) -> Iterator[str]:
    """The model's tensors, and those that its experts would have if they were fused."""
    yield from (name for name, _ in model.named_parameters(remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers())
    for owner, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{owner}.{name}" for name in module.fused_names)
