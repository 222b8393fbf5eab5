"""What a training changed, as the artifact it came from would store it."""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.errors import NumericsError, UnsupportedError
from infopt.core.models.conv1d import is_transposed
from infopt.core.models.sources import find_source


def trained_tensors(
    model: PreTrainedModel, artifact: Artifact, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The model's parameters, or those in `names`, under the artifact's names, on the CPU.

    Shapes (a Conv1D's transposed) and dtypes are the artifact's; tied parameters come under every
    name that the artifact has for them, mostly one. `model` is as `load_transformers` gives it for
    `artifact`. Raises UnsupportedError naming a parameter that the artifact holds quantized, fused
    with others or in a layout that infopt cannot write; NumericsError for one that is not finite in
    the stored dtype; ValueError for a name that the model has not.
    """
    aliases: defaultdict[int, list[str]] = defaultdict(list)
    known: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
        known[name] = parameter
    wanted = known if names is None else names
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"the model has no parameter {unknown[0]}")
    found: dict[str, Tensor] = {}
    for same in {id(known[name]): aliases[id(known[name])] for name in wanted}.values():
        stored = {alias: one for alias in same if (one := _stored(model, artifact, alias))}
        if not stored:
            raise _unsupported(same[0], "in a layout that infopt cannot write")
        for alias, one in stored.items():
            if one not in found:
                found[one] = _as_stored(model, artifact, alias, one)
    return found


def _stored(model: PreTrainedModel, artifact: Artifact, name: str) -> str | None:
    """The artifact's name for a parameter; None where it has none for it, as for a tied one."""
    source = find_source(model, artifact, name)
    if source.part is not None:
        raise _unsupported(name, "fused with those of other experts")
    if len(source.names) > 1:
        raise _unsupported(name, "quantized")
    return source.names[0] if source.names else None


def _as_stored(model: PreTrainedModel, artifact: Artifact, name: str, stored: str) -> Tensor:
    dtype: torch.dtype = getattr(torch, artifact.dtype(stored))
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise _unsupported(name, "quantized")
    owner, _, leaf = name.rpartition(".")
    value: Tensor = model.get_parameter(name).detach()
    if leaf == "weight" and value.ndim == 2 and is_transposed(model, owner):
        value = value.T
    if tuple(value.shape) != artifact.shape(stored):
        raise _unsupported(name, "in another shape")
    value = value.to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise NumericsError(f"{name} is not finite as {dtype}", "lower the learning rate")
    return value


def _unsupported(name: str, how: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} cannot be written back: the artifact holds it {how}",
        "convert the artifact to a dense one of transformers' own layout first",
    )
