"""How a config.json says that a model has become smaller."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

_FFN_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "d_inner")
"""Names of the feed-forward width; where it is null (GPT-2) it would follow the hidden width."""
_AS_HIDDEN = ("word_embed_proj_dim",)
"""Widths of embeddings that must follow the hidden width where they are equal to it."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes of a model, before or after."""

    layers: tuple[int, ...]
    """The blocks, by their numbers in the original."""
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int | None
    """None where the blocks have no one width."""


def smaller_config(
    model: PreTrainedModel, config: Mapping[str, Any], old: Widths, new: Widths
) -> dict[str, Any]:
    """The config with the new sizes; whether the architecture heeds them is to be seen after."""
    result = copy.deepcopy(dict(config))
    known = model.config.get_text_config()
    scope: dict[str, Any] = result
    if known is not model.config and isinstance(result.get("text_config"), dict):
        scope = result["text_config"]

    def put(key: str, value: int) -> None:
        scope[known.attribute_map.get(key, key)] = value
        if key in scope:
            scope[key] = value

    if new.layers != old.layers:
        put("num_hidden_layers", len(new.layers))
        scope |= _lists(known, scope, old, new)
    if new.heads != old.heads:
        put("num_attention_heads", new.heads)
        if getattr(known, "num_key_value_heads", None) is not None:
            put("num_key_value_heads", new.kv_groups)
    if (new.heads, new.hidden) != (old.heads, old.hidden) and (
        getattr(known, "head_dim", None) or new.head_dim * new.heads != new.hidden
    ):
        put("head_dim", new.head_dim)
    if new.hidden != old.hidden:
        put("hidden_size", new.hidden)
        for key in _AS_HIDDEN:
            if getattr(known, key, None) == old.hidden:
                put(key, new.hidden)
    if new.ffn is not None and (new.ffn, new.hidden) != (old.ffn, old.hidden):
        for key in _FFN_KEYS:
            if hasattr(known, key) and getattr(known, key) in (old.ffn, None):
                put(key, new.ffn)
    return result


def _lists(
    known: PreTrainedConfig, scope: Mapping[str, Any], old: Widths, new: Widths
) -> dict[str, Any]:
    """Lists with an entry for each block, such as `layer_types`, for those that stay."""
    found = {}
    for key, value in {**known.to_dict(), **scope}.items():
        if "layer" not in key or not isinstance(value, list) or len(value) != len(old.layers):
            continue
        # What the config leaves to be derived stays so where it is the same for all blocks.
        if key in scope or any(entry != value[0] for entry in value):
            found[key] = [value[index] for index in new.layers]
    return found
