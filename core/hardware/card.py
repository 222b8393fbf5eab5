"""The GPU at hand as kernels are launched on it, with the tiles that were measured there.

Tiles are measured only where that is asked for (`infopt bench kernels --tune`): loading and
starting read what lies there, and the tiles that infopt ships do for the rest.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from infopt.core.errors import UnsupportedError
from infopt.core.files import write_atomically
from infopt.core.hardware.calibration import calibration_file
from infopt.core.hardware.native import wanted_kernels
from infopt.kernels.gpu.tile import Card, Rules, rules_from

if TYPE_CHECKING:
    import torch

OLDEST = 80
"""Of capabilities that kernels are compiled for."""


class MeasuredTiles(BaseModel):
    """The fastest tiles of one device, launch by launch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    provenance: Literal["measured"] = "measured"
    device: str
    versions: str
    """Of the compilers: what was measured with others says nothing."""
    kernels: Mapping[str, tuple[Mapping[str, Any], ...]] = {}
    """As `kernels.gpu.tile.rules_from` reads them, each with its median seconds."""

    def rules(self) -> Rules:
        """Raises as `rules_from`."""
        return rules_from(json.dumps({"kernels": {k: list(v) for k, v in self.kernels.items()}}))


def tiles_file(device: str, *, cache: Path | None = None) -> Path:
    """Beside the peaks of the same device."""
    return calibration_file(device, "tiles", 1, cache=cache)


def load_tiles(device: str, versions: str, *, cache: Path | None = None) -> MeasuredTiles:
    """The stored tiles; none where there are none that hold."""
    empty = MeasuredTiles(device=device, versions=versions)
    try:
        text = tiles_file(device, cache=cache).read_bytes()
        found = MeasuredTiles.model_validate_json(text)
        found.rules()
    except (OSError, ValidationError, ValueError, KeyError, TypeError):
        return empty
    return found if (found.device, found.versions) == (device, versions) else empty


def store_tiles(record: MeasuredTiles, *, cache: Path | None = None) -> Path:
    """Write a record in its place, whole or not at all; raises ResourceError for a full disk."""
    file = tiles_file(record.device, cache=cache)
    write_atomically(file, record.model_dump_json(indent=1) + "\n")
    return file


def compiler_versions() -> str:
    """Of torch and Triton, without importing Triton."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        return f"torch {torch.__version__}, triton {version('triton')}"
    except PackageNotFoundError:
        return f"torch {torch.__version__}"


def card_of(device: "torch.device", *, cache: Path | None = None) -> Card:
    """A GPU that torch sees, with the tiles that were measured on it before those that ship."""
    card = Card.at_hand(device)
    return card.preferring(load_tiles(card.name, compiler_versions(), cache=cache).rules())


def find_card(word: str, device: "torch.device") -> Card | None:
    """The GPU whose kernels are used for 'auto', 'native' or 'torch'; None where torch's are.

    Raises UnsupportedError where 'native' is demanded of a GPU and Triton is missing, or the GPU is
    older than Ampere.
    """
    if device.type != "cuda" or wanted_kernels(word) == "torch":
        return None
    missing = importlib.util.find_spec("triton") is None
    if not missing and (card := card_of(device)).capability >= OLDEST:
        return card
    if wanted_kernels(word) == "native":
        why = "Triton is not installed" if missing else f"{card.name} is older than Ampere"
        raise UnsupportedError(f"no kernels for this GPU: {why}", "use --kernels torch")
    return None
