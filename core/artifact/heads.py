"""Medusa heads on disk: a small directory of their own, beside the model they were trained on.

`medusa_heads.safetensors` holds `blocks.K.layers.L.weight` and `.bias` of head K (from 0) and layer
L, and `lm_heads.K.weight` where a head has a projection of its own. That may be to a part of the
vocabulary, whose tokens `token_map` then names, row by row. Tensors and the config's keys are named
as vLLM's MedusaModel names them; `base_model` and `base_fingerprint` are ours.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.core.artifact.headers import TensorHeader, read_header
from infopt.core.artifact.read import CONFIG, read_json
from infopt.core.artifact.write import write_manifest
from infopt.core.errors import ArtifactError, UsageError
from infopt.core.files import directory_atomically

if TYPE_CHECKING:
    from torch import Tensor

HEADS = "medusa_heads.safetensors"
TOKEN_MAP = "token_map"
_TYPE = "medusa"


@dataclass(frozen=True, slots=True)
class HeadsShape:
    """What the config of a directory of heads says."""

    base: str
    """The base model's name."""
    fingerprint: str
    """Of the base model: `Artifact.fingerprint()`."""
    heads: int
    layers: int
    hidden_size: int
    vocab_size: int
    shared: bool
    """Whether all heads use the base's own lm_head."""
    guessed: int | None = None
    """Tokens that projections of their own choose among; None for the whole vocabulary."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to it."""
        found: dict[str, tuple[int, ...]] = {}
        for head in range(self.heads):
            for layer in range(self.layers):
                name = f"blocks.{head}.layers.{layer}"
                found[f"{name}.weight"] = (self.hidden_size, self.hidden_size)
                found[f"{name}.bias"] = (self.hidden_size,)
            if not self.shared:
                rows = self.vocab_size if self.guessed is None else self.guessed
                found[f"lm_heads.{head}.weight"] = (rows, self.hidden_size)
        if self.guessed is not None:
            found[TOKEN_MAP] = (self.guessed,)
        return found


@dataclass(frozen=True, slots=True)
class MedusaHeads:
    """Heads on disk; nothing but headers is in memory."""

    path: Path
    shape: HeadsShape
    headers: dict[str, TensorHeader]

    def tensors(self) -> "dict[str, Tensor]":
        """All of them; raises ArtifactError where the file cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: dict[str, Tensor] = load_file(self.path / HEADS)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"cannot read {self.path / HEADS}: {error}") from error
        return found

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    def check_fits(self, hidden_size: int, vocab_size: int) -> None:
        """Raise UsageError where the heads cannot be of a model of these sizes.

        That `shape.fingerprint` is another is no fault: a quantized copy takes its base's heads.
        """
        mine = (self.shape.hidden_size, self.shape.vocab_size)
        if mine != (hidden_size, vocab_size):
            raise UsageError(
                f"the heads in {self.path} are for states of {mine[0]} and a vocabulary of "
                f"{mine[1]}; the model has {hidden_size} and {vocab_size}",
                f"they were trained on {self.shape.base}",
            )


def write_heads(
    output: Path,
    shape: HeadsShape,
    tensors: "Mapping[str, Tensor]",
    *,
    extra: Mapping[str, str] | None = None,
    replace: bool = False,
) -> MedusaHeads:
    """Write heads as a directory, whole or not at all, and return them as read back.

    Raises UsageError where `output` may not be replaced, ArtifactError if the disk gave back
    something else than was written.
    """
    import torch
    from safetensors.torch import load_file, save_file

    output = output.expanduser().absolute()
    with directory_atomically(output, replace=replace) as folder:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / HEADS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(shape, whole), indent=2) + "\n")
        for name, content in (extra or {}).items():
            (folder / name).write_text(content)
        write_manifest(folder)
        read_heads(folder)
        again = load_file(folder / HEADS)
        if any(not torch.equal(again[name], tensor) for name, tensor in whole.items()):
            raise ArtifactError(f"{output}: what was read back is not what was written")
    return read_heads(output)


def read_heads(path: Path) -> MedusaHeads:
    """Open a directory of heads, every header held to the config, no tensor loaded.

    Raises UsageError if it does not exist, ArtifactError for what is missing, wrong or corrupt.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(f"no such directory of Medusa heads: {path}")
    if not (path / CONFIG).exists() or not (path / HEADS).exists():
        raise ArtifactError(
            f"{path} holds no Medusa heads: it needs {CONFIG} and {HEADS}",
            "infopt distill --medusa-heads N trains some",
        )
    shape = _shape(path / CONFIG)
    headers = read_header(path / HEADS)
    wanted = shape.shapes()
    found = {name: header.shape for name, header in headers.items()}
    if found != wanted:
        name = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise ArtifactError(
            f"{path / HEADS}: {name} is {_words(found.get(name))}, "
            f"and {CONFIG} asks for {_words(wanted.get(name))}"
        )
    return MedusaHeads(path, shape, headers)


def _config(shape: HeadsShape, tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    return {
        "architectures": ["MedusaModel"],
        "model_type": _TYPE,
        "base_model": shape.base,
        "base_fingerprint": shape.fingerprint,
        "num_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "truncated_vocab_size": shape.vocab_size if shape.guessed is None else shape.guessed,
        "original_lm_head": shape.shared,
        "medusa_fc_bias": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _shape(file: Path) -> HeadsShape:
    table = read_json(file)
    if table.get("model_type") != _TYPE:
        raise ArtifactError(f"{file} is not of Medusa heads: model_type {table.get('model_type')}")
    numbers = {key: table.get(key) for key in ("num_heads", "num_hidden_layers")}
    numbers |= {key: table.get(key) for key in ("hidden_size", "vocab_size")}
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArtifactError(f"{file}: {key} must be a positive integer (got {value!r})")
    heads, layers, hidden, vocabulary = (int(str(value)) for value in numbers.values())
    guessed = table.get("truncated_vocab_size", vocabulary)
    if not isinstance(guessed, int) or not 0 < guessed <= vocabulary:
        raise ArtifactError(
            f"{file}: truncated_vocab_size must be from 1 to {vocabulary} (got {guessed!r})"
        )
    return HeadsShape(
        base=str(table.get("base_model", "unknown")),
        fingerprint=str(table.get("base_fingerprint", "")),
        heads=heads,
        layers=layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        shared=bool(table.get("original_lm_head", False)),
        guessed=None if guessed == vocabulary else guessed,
    )


def _words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
