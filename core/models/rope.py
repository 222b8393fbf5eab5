"""What a config.json says of rotary positions, in the manner of transformers 4 or 5."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infopt.core.errors import ArtifactError, UnsupportedError

_KNOWN = (
    "known: default, linear, dynamic (within the model's own positions), yarn, llama3, longrope"
)
_PLAIN = "full_attention"
_LOCAL = "sliding_attention"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched; what a kind does not use stays as it is."""

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    attention_factor: float = 1.0
    """Sines and cosines are multiplied by it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    """Of each pair, within `original_positions` (longrope)."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of a kind of layer."""

    theta: float
    dim: int
    """Columns of a head that are rotated: the first ones."""
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Ropes:
    """Those of a model, and how many positions they are good for."""

    whole: Rope
    local: Rope | None
    max_positions: int


def read_ropes(
    config: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    theta: float,
    local_theta: float | None,
    longrope_by: tuple[str, ...],
) -> Ropes:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    `theta` and `local_theta` are what a config leaves unsaid. Longrope has other factors beyond
    its original positions, by which the keys of a request would change as it grows: the model is
    taken to end there. Raises UnsupportedError for a scaling that is not known.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = _PLAIN in said or _LOCAL in said
    plain = dict((said.get(_PLAIN) or {}) if nested else said)
    plain.setdefault("rope_theta", config.get("rope_theta") or theta)
    plain.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        plain.setdefault("original_max_position_embeddings", original)
    whole, limit = _rope(plain, head_dim, max_positions, longrope_by)
    if local_theta is None:
        return Ropes(whole, None, limit)
    near = dict((said.get(_LOCAL) or {}) if nested else {})
    near.setdefault("rope_theta", config.get("rope_local_base_freq") or local_theta)
    local, _ = _rope(near, head_dim, max_positions, longrope_by)
    return Ropes(whole, local, limit)


def _rope(
    rope: Mapping[str, Any], head_dim: int, max_positions: int, longrope_by: tuple[str, ...]
) -> tuple[Rope, int]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta, dim = float(rope["rope_theta"]), head_dim
    partial = float(rope.get("partial_rotary_factor") or 1.0)
    if partial != 1.0:
        dim = int(head_dim * partial)
    try:
        if kind in longrope_by:
            scaling = _longrope(rope, max_positions)
            if len(scaling.short_factors) != dim // 2:
                raise ArtifactError(
                    f"config.json: short_factor has {len(scaling.short_factors)} values, "
                    f"a head has {dim // 2} pairs"
                )
            return Rope(theta, dim, scaling), scaling.original_positions
        # Dynamic NTK leaves the frequencies alone up to the model's own positions.
        if kind in ("default", "dynamic"):
            return Rope(theta, dim), max_positions
        return Rope(theta, dim, _scaling(kind, rope, max_positions)), max_positions
    except KeyError as missing:
        raise ArtifactError(f"config.json: rope scaling {kind!r} lacks {missing}") from None


def _scaling(kind: str, rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    match kind:
        case "linear":
            return RopeScaling("linear", float(rope["factor"]))
        case "llama3":
            return RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                original,
            )
        case "yarn":
            return _yarn(rope, max_positions, original)
    raise UnsupportedError(f"the rope scaling {kind!r} is not known", _KNOWN)


def _yarn(rope: Mapping[str, Any], max_positions: int, original: int) -> RopeScaling:
    """Peng et al. 2023, arXiv 2309.00071; the attention factor as transformers has it."""
    factor = float(rope["factor"] or max_positions / original)
    attention = rope.get("attention_factor")
    if attention is None:
        mscale, whole = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = _magnitude(factor, 1.0)
        if mscale and whole:
            attention = _magnitude(factor, mscale) / _magnitude(factor, whole)
    return RopeScaling(
        "yarn",
        factor,
        original_positions=original,
        attention_factor=float(attention),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
    )


def _magnitude(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _longrope(rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """Ding et al. 2024, arXiv 2402.13753."""
    original = int(rope.get("original_max_position_embeddings") or max_positions)
    factor = float(rope.get("factor") or max_positions / original)
    attention = rope.get("attention_factor")
    if attention is None:
        stretched = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original))
        attention = 1.0 if factor <= 1 else stretched
    return RopeScaling(
        "longrope",
        factor,
        original_positions=original,
        attention_factor=float(attention),
        short_factors=tuple(map(float, rope["short_factor"])),
    )
