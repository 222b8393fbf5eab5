"""What a model with fewer key/value heads is made of, resolved before any weight is read."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from infopt.core.artifact.read import Artifact
from infopt.core.conversion.grouped_query import (
    check_groups,
    pool_heads,
    pool_rows,
    spread_heads,
    spread_rows,
)
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.hf import blocks, resolve, skeleton
from infopt.core.recipe.kv_heads import KvHeadsSettings

_KEY = "num_key_value_heads"

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter of the model whose rows are of key/value heads, `before` rows of queries apart.

    `before` is None where keys and values have tensors of their own.
    """

    name: str
    stored: str
    before: int | None

    def pool(self, value: Tensor, heads: int, groups: int) -> Tensor:
        if self.before is None:
            return pool_heads(value, heads, groups)
        return pool_rows(value, heads, groups, before=self.before)

    def spread(self, value: Tensor, heads: int, groups: int) -> Tensor:
        if self.before is None:
            return spread_heads(value, heads, groups)
        return spread_rows(value, heads, groups, before=self.before)


@dataclass(frozen=True, slots=True)
class KvJob:
    """An artifact, its settings and what follows from both."""

    artifact: Artifact
    settings: KvHeadsSettings
    heads: int
    """Key/value heads, as it is."""
    queries: int
    """Query heads."""
    head_dim: int
    layers: int
    """Those that have keys and values."""
    parts: tuple[Part, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.settings.kv_heads

    @property
    def config(self) -> dict[str, Any]:
        """Of the new artifact."""
        return {**self.artifact.config, _KEY: self.groups}

    def kv_bytes(self, heads: int) -> int:
        """Keys and values of a token over all layers, in the dtype of the weights."""
        headers = self.artifact.headers
        # Without parts, one head stays one: the largest tensor speaks for the others.
        stored = (
            headers[self.parts[0].stored]
            if self.parts
            else max(headers.values(), key=lambda header: header.numel)
        ).dtype
        width: int = getattr(torch, stored).itemsize
        return 2 * self.layers * heads * self.head_dim * width

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the new artifact, one at a time."""
        parts = {part.stored: part for part in self.parts}
        for name in self.artifact.names():
            value = self.artifact.tensor(name)
            yield name, parts[name].pool(value, self.heads, self.groups) if name in parts else value

    def identity(self) -> dict[str, str]:
        """What must be equal for unfinished work to be continued."""
        settings = self.settings.model_dump(mode="json", exclude={"text"})
        return {
            "model": self.artifact.fingerprint(),
            "infopt version": version("infopt"),
            "torch version": torch.__version__,
            "device": self.device.type,
            "compute dtype": str(self.dtype),
            **{f"setting {key}": json.dumps(value) for key, value in settings.items()},
        }


def resolve_kv(artifact: Artifact, settings: KvHeadsSettings) -> KvJob:
    """Find what is to be joined.

    The model's own code tells: its parameters are shaped for either number of heads, and those
    that differ are keys and values. Raises UsageError where the heads do not divide,
    UnsupportedError where a config has no word for their number, or no such parameters are found.
    """
    if artifact.quantization is not None:
        raise UnsupportedError(
            f"{artifact.name} is quantized: its heads have no mean", "give the model it was made of"
        )
    model = skeleton(artifact)
    config: PreTrainedConfig = model.config
    heads = getattr(config, _KEY, None)
    if not isinstance(heads, int) or config.get_text_config() is not config:
        raise UnsupportedError(
            f"the config of {type(model).__name__} has no {_KEY}: no checkpoint of its kind could "
            "say that there are fewer",
            "models such as Llama, Mistral, Qwen, Gemma and Phi-3 can",
        )
    if problem := check_groups(heads, settings.kv_heads):
        raise UsageError(problem, "choose another --kv-heads")
    queries = int(config.num_attention_heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    groups = settings.kv_heads if settings.kv_heads < heads else 1
    parts = []
    for name, (old, new) in _differences(config, groups).items():
        before = _queries_before(old, new, heads, groups, dim)
        stored = resolve(model, artifact, name)
        if before is _UNKNOWN or len(stored) != 1 or artifact.shape(stored[0]) != old:
            raise UnsupportedError(
                f"{name} of {type(model).__name__} depends on the number of key/value heads in a "
                f"way that infopt does not know: {list(old)} would be {list(new)}"
            )
        parts.append(Part(name, stored[0], None if before == 0 else before))
    holding = [
        name for name, _ in blocks(model) if any(part.name.startswith(f"{name}.") for part in parts)
    ]
    if heads > 1 and not holding:
        raise UnsupportedError(
            f"no parameter of {type(model).__name__} depends on its {_KEY}",
            "its attention has no key/value heads that could be joined",
        )
    device = choose_device(settings.device)
    return KvJob(
        artifact,
        settings,
        heads,
        queries,
        dim,
        len(holding) or len(blocks(model)),
        tuple(parts),
        torch.device(device),
        getattr(torch, choose_dtype(settings.dtype, device)),
    )


_UNKNOWN = -1


def _queries_before(
    old: tuple[int, ...], new: tuple[int, ...], heads: int, groups: int, dim: int
) -> int:
    """Rows of queries before those of keys and values; 0 for keys or values alone, else -1."""
    if len(old) != len(new) or old[1:] != new[1:]:
        return _UNKNOWN
    if (old[0], new[0]) == (heads * dim, groups * dim):
        return 0
    before = old[0] - 2 * heads * dim
    return before if before > 0 and new[0] - 2 * groups * dim == before else _UNKNOWN


def _differences(
    config: PreTrainedConfig, groups: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The parameters of other shapes with so many key/value heads: as they are, as they would be.

    Raises UnsupportedError where the model cannot be built so.
    """
    changed = copy.deepcopy(config)
    setattr(changed, _KEY, groups)
    try:
        old, new = _shapes(config), _shapes(changed)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"a model of {config.model_type} with {groups} key/value heads cannot be built: "
            f"{reason}"
        ) from error
    return {
        name: (shape, new[name])
        for name, shape in old.items()
        if name in new and new[name] != shape
    }


def _shapes(config: PreTrainedConfig) -> Shapes:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}
