"""The tensors and side files of a pruned artifact."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.models.unfused import UnfusedArtifact
from infopt.core.recipe.prune import PruneSettings
from infopt.core.recipe.recipe import Recipe, Step, dump_recipe


def recipe_files(settings: PruneSettings) -> dict[str, str | bytes]:
    """The recipe that makes this artifact again, for `extra`."""
    step = Step(verb="prune", settings=settings)
    return {"recipe.yaml": dump_recipe(Recipe(name="prune", steps=(step,)))}


def whole_tensors(
    artifact: Artifact, changed: Iterable[str], value: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the artifact with `changed` ones replaced, one at a time.

    Experts that the artifact holds fused are fused again: the layout stays what its loaders know.
    """
    new = set(changed)
    parts = artifact.parts if isinstance(artifact, UnfusedArtifact) else {}
    fused: dict[str, list[str]] = {}
    for name, (owner, _) in parts.items():
        fused.setdefault(owner, []).append(name)
    for name in sorted({*artifact.names(), *fused} - set(parts)):
        if name in fused and isinstance(artifact, UnfusedArtifact):
            yield name, _fused(artifact, name, [n for n in fused[name] if n in new], value)
        else:
            yield name, value(name) if name in new else artifact.tensor(name)


def _fused(
    artifact: UnfusedArtifact, name: str, changed: list[str], value: Callable[[str], Tensor]
) -> Tensor:
    """The fused tensor with the experts' parts `changed` put back in their places."""
    whole = artifact.whole.tensor(name).clone()
    for part_name in changed:
        part = artifact.parts[part_name][1]
        own = whole[part.expert]
        if part.transposed and own.ndim == 2:
            own = own.T
        if part.half is not None:
            size = len(own) // 2
            own = own[part.half :: 2] if part.interleaved else own[part.half * size :][:size]
        own.copy_(value(part_name))
    return whole
