"""An artifact that holds experts fused, seen as if it held them apart."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from infopt.core.artifact.read import Artifact
from infopt.core.models.experts import FusedPart
from infopt.core.models.sources import find_source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class UnfusedArtifact(Artifact):
    """`whole`, with `parts` (by name: the fused tensor and what of it is meant) in its place."""

    whole: Artifact
    parts: dict[str, tuple[str, FusedPart]]

    def tensor(self, name: str) -> "Tensor":
        if name not in self.parts:
            return self.whole.tensor(name)
        fused, part = self.parts[name]
        return part.cut(self.whole.tensor(fused))


def unfused(model: PreTrainedModel, artifact: Artifact) -> Artifact:
    """The artifact with a tensor for every parameter of every expert, named as in the model.

    The artifact itself where no tensor is fused. `model` is its skeleton.
    """
    parts: dict[str, tuple[str, FusedPart]] = {}
    headers = dict(artifact.headers)
    for name, parameter in model.named_parameters():
        source = find_source(model, artifact, name)
        if source.part is None:
            continue
        (fused,) = source.names
        parts[name] = (fused, source.part)
        whole = artifact.headers[fused]
        shape = tuple(parameter.shape)
        size = whole.nbytes * math.prod(shape) // whole.numel
        headers[name] = replace(whole, shape=shape, nbytes=size)
    if not parts:
        return artifact
    for fused, _ in parts.values():
        headers.pop(fused, None)
    return UnfusedArtifact(
        name=artifact.name,
        path=artifact.path,
        config=artifact.config,
        files={name: header.file for name, header in headers.items()},
        headers=headers,
        trust_remote_code=artifact.trust_remote_code,
        whole=artifact,
        parts=parts,
    )
