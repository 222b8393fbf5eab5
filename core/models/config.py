"""What the decoder must know of a model, read from a Hugging Face config.json without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infopt.core.errors import ArtifactError, UnsupportedError
from infopt.core.models.families import FAMILIES, Family, Names, Part
from infopt.core.models.rope import Rope, Ropes, read_ropes

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_WINDOWED, _FULL = "sliding_attention", "full_attention"
_MAX_WINDOW_LAYERS = 28
"""Of Qwen2 and Qwen3, where the config does not say."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of the layers that have them."""

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool
    """Whether the weights of a token's experts sum to 1."""
    layers: tuple[bool, ...]
    """Of each layer, whether it has experts or a plain MLP."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    architecture: str
    names: Names
    vocab_size: int
    hidden_size: int
    embedding_size: int
    """Of a token's embedding; projected where it is not `hidden_size`."""
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    """Is added to the weights of a norm."""
    norms_after: bool
    """Norms follow what they belong to, the sum with the residual included."""
    final_norm: bool
    rope: Rope | None
    """None: positions are learned."""
    local_rope: Rope | None
    """Of the layers with a window; None: that of all."""
    position_offset: int
    """The first row of learned positions that is used."""
    biases: frozenset[Part]
    qk_norm: bool
    """RMSNorm on each head's query and key before the rotation."""
    query_scale: float
    """Scores are multiplied by it."""
    attention_cap: float | None
    """Scores become cap * tanh(score / cap)."""
    logit_cap: float | None
    embedding_scale: float
    tied_embeddings: bool
    gated: bool
    activation: Activation
    transposed: bool
    """Dense weights are stored [inputs, outputs]."""
    windows: tuple[int | None, ...]
    """Of each layer, the tokens it looks back on, itself included; None: all of `max_positions`."""
    experts: Experts | None
    eos_token_ids: tuple[int, ...]

    @property
    def sliding_window(self) -> int | None:
        """The tokens that no layer looks beyond; None where some layer sees all."""
        limited = [window for window in self.windows if window is not None]
        return max(limited) if len(limited) == self.layers else None

    @property
    def full_attention_positions(self) -> int:
        """The longest sequence that the decoder computes as the model means it."""
        return self.max_positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json, in the manner of transformers 4 or 5.

        Raises UnsupportedError for what the decoder does not know, ArtifactError for what is not
        there.
        """
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        said = _said(config, family)
        hidden, heads = positive(said, "hidden_size"), positive(said, "num_attention_heads")
        kv_heads = int(said.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise ArtifactError(f"{heads} attention heads cannot share {kv_heads} key/value heads")
        layers = positive(said, "num_hidden_layers")
        head_dim = int(said.get("head_dim") or family.head_dim or hidden // heads)
        ropes, max_positions = _positions(said, family, head_dim)
        scaled = said.get("query_pre_attn_scalar", 256) if family.scaled_query else head_dim
        after = not said.get("do_layer_norm_before", True)
        return cls(
            architecture=architecture,
            names=family.names,
            vocab_size=positive(said, "vocab_size"),
            hidden_size=hidden,
            embedding_size=int(said.get("word_embed_proj_dim") or hidden),
            intermediate_size=positive(said, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=max_positions,
            norm=family.norm,
            norm_eps=float(said.get("rms_norm_eps", family.norm_eps)),
            norm_offset=family.norm_offset,
            norms_after=after,
            final_norm=not (after or said.get("_remove_final_layer_norm", False)),
            rope=ropes.whole if ropes else None,
            local_rope=ropes.local if ropes else None,
            position_offset=family.position_offset,
            biases=_biases(said, family),
            qk_norm=family.qk_norm,
            query_scale=float(scaled) ** -0.5,
            attention_cap=_cap(said.get("attn_logit_softcapping", family.attention_cap)),
            logit_cap=_cap(said.get("final_logit_softcapping", family.logit_cap)),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            tied_embeddings=bool(said.get("tie_word_embeddings", family.tied)),
            gated=family.gated,
            activation=_activation(said, family),
            transposed=family.transposed,
            windows=_windows(said, family, layers, max_positions),
            experts=_experts(said, family, layers),
            eos_token_ids=token_ids(said.get("eos_token_id")),
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a config or generation config: one, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or [f"model_type {config.get('model_type')!r}"]
    if named[0] not in FAMILIES:
        raise UnsupportedError(
            f"the runtime does not know the architecture {named[0]}",
            f"it knows {', '.join(sorted(FAMILIES))}",
        )
    return str(named[0])


def _said(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config under the keys that most architectures have."""
    said = dict(config)
    for ours, theirs in family.aliases.items():
        if theirs in config:
            said[ours] = config[theirs]
    if said.get("intermediate_size") is None and not family.gated and said.get("hidden_size"):
        said["intermediate_size"] = 4 * said["hidden_size"]
    for key, needed in family.refused.items():
        value = config.get(key)
        if value is not None and value != needed:
            raise UnsupportedError(f"{key} {value} is not known", f"known: {needed}")
    return said


def positive(config: Mapping[str, Any], key: str) -> int:
    """A size of a config.json; raises ArtifactError where it is none."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ArtifactError(f"config.json: {key} must be a positive integer (got {value!r})")
    return value


def _positions(
    config: Mapping[str, Any], family: Family, head_dim: int
) -> tuple[Ropes | None, int]:
    limit = int(config.get("max_position_embeddings") or family.max_positions)
    if family.positions == "learned":
        return None, limit
    ropes = read_ropes(
        config,
        head_dim,
        limit,
        theta=family.theta,
        local_theta=family.local_theta,
        longrope_by=family.longrope_by,
    )
    return ropes, ropes.max_positions


def _biases(config: Mapping[str, Any], family: Family) -> frozenset[Part]:
    found = set(family.biases)
    for key, parts in family.bias_keys.items():
        if config.get(key, family.biased_unless_said):
            found |= set(parts)
    return frozenset(found)


def _cap(value: float | None) -> float | None:
    return float(value) if value else None


def _activation(config: Mapping[str, Any], family: Family) -> Activation:
    named = config.get(family.activation_key) or family.activation
    if named not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the activation {named!r} is not known", f"known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[named]


def _windows(
    config: Mapping[str, Any], family: Family, layers: int, max_positions: int
) -> tuple[int | None, ...]:
    kinds = _layer_kinds(config, family, layers)
    if len(kinds) != layers or set(kinds) - {_WINDOWED, _FULL}:
        raise UnsupportedError(
            f"layer_types {sorted(set(kinds))} for {layers} layers are not known",
            f"known: {_WINDOWED} and {_FULL}, one for each layer",
        )
    opted = not family.window_is_opt_in or bool(config.get("use_sliding_window", False))
    window = config.get("sliding_window", family.sliding_window)
    if family.windows == "none" or not opted or not window or window >= max_positions:
        return (None,) * layers
    return tuple(int(window) if kind == _WINDOWED else None for kind in kinds)


def _layer_kinds(config: Mapping[str, Any], family: Family, layers: int) -> list[str]:
    if family.windows == "all":
        return [_WINDOWED] * layers
    if (said := config.get("layer_types")) is not None:
        return list(said)
    if family.window_pattern is not None:
        every = int(config.get("sliding_window_pattern") or family.window_pattern)
        return [_FULL if (n + 1) % every == 0 else _WINDOWED for n in range(layers)]
    first = int(config.get("max_window_layers", _MAX_WINDOW_LAYERS))
    return [_WINDOWED if n >= first else _FULL for n in range(layers)]


def _experts(config: Mapping[str, Any], family: Family, layers: int) -> Experts | None:
    if not family.experts_key:
        return None
    count = positive(config, _first(config, (family.experts_key, "num_local_experts")))
    step, plain = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    per_token = int(config.get("num_experts_per_tok") or family.experts_per_token)
    if per_token > count:
        raise ArtifactError(f"config.json: {per_token} experts a token, of {count}")
    normalized = config.get("norm_topk_prob", False)
    return Experts(
        count=count,
        per_token=per_token,
        intermediate_size=positive(config, family.expert_size_key),
        normalized=bool(normalized) if family.normalized is None else family.normalized,
        layers=tuple(n not in plain and (n + 1) % step == 0 for n in range(layers)),
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if key in config), keys[0])
