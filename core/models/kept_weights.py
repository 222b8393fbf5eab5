"""Weights as native kernels read them, kept beside the artifact that they were packed from.

The file may be removed at any moment, and is made anew where it does not fit: of other files, of
another layout, another build of the kernels, or damaged.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infopt.core.artifact.read import CONFIG, Artifact
from infopt.core.files import cache_directory
from infopt.core.layers.choice import NativeChoice
from infopt.core.layers.kept import LAYOUT, parts_of, taken_up
from infopt.core.layers.linear import Projection
from infopt.kernels.cpu.image import Image, ImageError, read_image, write_image

FOLDER = ".infopt"
"""In the artifact's own; in the user's cache where nobody may write there."""
LEAST_BYTES = 16 << 20
"""Less is packed in no time."""
_log = logging.getLogger(__name__)


class KeptWeights:
    """Native projections of one artifact by the names of their layers."""

    def __init__(
        self, artifact: Artifact, choice: NativeChoice, *, least_bytes: int = LEAST_BYTES
    ) -> None:
        self._choice = choice
        self._least = least_bytes
        self._identity = identity(artifact, choice)
        self._files = places(artifact, choice)
        self._entries: dict[str, Any] = {}
        self._tensors: tuple[Tensor, ...] = ()
        self._new: dict[str, Projection] = {}
        for file in self._files:
            if (image := self._image(file)) is not None:
                self._entries, self._tensors = image.about["layers"], image.tensors
                break

    def find(self, name: str, shape: tuple[int, int]) -> Projection | None:
        """The projection [outputs, inputs] of that name; None where it was not kept, or would not
        be native now."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        tensors = {part: self._tensors[number] for part, number in entry["tensors"].items()}
        found = taken_up(self._choice.native, entry["numbers"], tensors, shape)
        return None if found is None else self._choice.takes(found)

    def put(self, name: str, projection: Projection) -> None:
        """Remember a projection that was made now, if it is native."""
        if parts_of(projection) is not None:
            self._new[name] = projection

    def keep(self) -> None:
        """Write what was made now, and what there was, if anything is new and it is worth it.

        Where it cannot be written, the next load packs again.
        """
        entries, tensors = self._whole()
        if not self._new or sum(tensor.nbytes for tensor in tensors) < self._least:
            return
        about = {**self._identity, "layers": entries}
        for file in self._files:
            try:
                size = write_image(file, about, tensors)
            except OSError:
                continue
            _log.info("packed weights are kept for the next start: %s, %d MB", file, size // 10**6)
            return

    def _whole(self) -> tuple[dict[str, Any], list[Tensor]]:
        entries: dict[str, Any] = {}
        tensors: list[Tensor] = []

        def add(name: str, numbers: Any, parts: dict[str, Tensor | None]) -> None:
            held = {part: tensor for part, tensor in parts.items() if tensor is not None}
            numbered = {part: len(tensors) + n for n, part in enumerate(held)}
            entries[name] = {"numbers": numbers, "tensors": numbered}
            tensors.extend(held.values())

        for name, entry in self._entries.items():
            if name not in self._new:
                parts = {part: self._tensors[n] for part, n in entry["tensors"].items()}
                add(name, entry["numbers"], dict(parts))
        for name, projection in self._new.items():
            found = parts_of(projection)
            assert found is not None
            add(name, *found)
        return entries, tensors

    def _image(self, file: Path) -> Image | None:
        def accept(about: dict[str, Any]) -> None:
            # A changed model or build is no fault of the file: it is replaced without a word.
            if any(about.get(key) != value for key, value in self._identity.items()):
                raise _OfAnotherError
            if not _is_table(about.get("layers")):
                raise ImageError("its table is wrong")

        try:
            image = read_image(file, accept, torch.get_num_threads())
            if not _within(image):
                raise ImageError("its table is wrong")
        except (_OfAnotherError, FileNotFoundError):
            return None
        except ImageError as error:
            _log.warning("packed weights are made anew, %s is not used: %s", file, error)
            return None
        return image


class _OfAnotherError(Exception):
    """The file is of another artifact, layout or build."""


def identity(artifact: Artifact, choice: NativeChoice) -> dict[str, Any]:
    """What packed weights depend on, beside the choice between native kernels and torch's."""
    digest = hashlib.sha256()
    for value in (artifact.config, artifact.quantization):
        digest.update(json.dumps(value, sort_keys=True).encode())
    stats = [(file, file.stat()) for file in sorted(set(artifact.files.values()))]
    return {
        "layout": LAYOUT,
        "build": f"{choice.native.isa} {choice.native.build}",
        "dtype": str(choice.dtype).removeprefix("torch."),
        "config": digest.hexdigest(),
        "files": [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
    }


def places(artifact: Artifact, choice: NativeChoice) -> Sequence[Path]:
    """Where an artifact's packed weights may lie, the best place first.

    The hub's cache is not ours to write into: its files are links.
    """
    dtype = str(choice.dtype).removeprefix("torch.")
    name = f"{dtype}-{choice.native.isa}.packed"
    folder = artifact.path.resolve()
    own = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    cached = cache_directory() / "packed" / f"{folder.name}-{own}" / name
    if (artifact.path / CONFIG).is_symlink():
        return (cached,)
    return (folder / FOLDER / name, cached)


def _is_table(layers: Any) -> bool:
    return isinstance(layers, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("numbers"), dict)
        and isinstance(entry.get("tensors"), dict)
        and all(type(number) is int for number in entry["tensors"].values())
        for entry in layers.values()
    )


def _within(image: Image) -> bool:
    used = [n for entry in image.about["layers"].values() for n in entry["tensors"].values()]
    return all(0 <= n < len(image.tensors) for n in used)
