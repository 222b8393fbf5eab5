"""What the decoder must know of a model, read from a Hugging Face config.json without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infopt.core.errors import ArtifactError, UnsupportedError


@dataclass(frozen=True, slots=True)
class _Family:
    """What a config.json leaves unsaid: how an architecture differs from Llama."""

    qkv_bias: bool = False
    optional_biases: tuple[str, ...] = ()
    """The config's keys that add biases here; other architectures ignore them."""
    qk_norm: bool = False
    head_dim: int | None = None
    max_positions: int = 2048
    sliding_window: int | None = None
    window_is_opt_in: bool = False


FAMILIES = {
    "LlamaForCausalLM": _Family(optional_biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": _Family(max_positions=131072, sliding_window=4096),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, max_positions=32768, window_is_opt_in=True),
    "Qwen3ForCausalLM": _Family(
        optional_biases=("attention_bias",),
        qk_norm=True,
        head_dim=128,
        max_positions=32768,
        window_is_opt_in=True,
    ),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched; the last three are of `llama3` alone."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer with RMSNorm, rotary positions and a gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool
    """A bias on the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm on each head's query and key before the rotation."""
    tied_embeddings: bool
    activation: Literal["silu"]
    sliding_window: int | None
    """Tokens that a layer looks back on; None where that is no limit within `max_positions`."""
    eos_token_ids: tuple[int, ...]

    @property
    def full_attention_positions(self) -> int:
        """The longest sequence over which attending to every token is what the model means."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json, in the manner of transformers 4 or 5.

        Raises UnsupportedError for what the decoder does not know, ArtifactError for what is not
        there.
        """
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        heads = _positive(config, "num_attention_heads")
        hidden_size = _positive(config, "hidden_size")
        kv_heads = int(config.get("num_key_value_heads") or heads)
        if heads % kv_heads:
            raise ArtifactError(f"{heads} attention heads cannot share {kv_heads} key/value heads")
        max_positions = int(config.get("max_position_embeddings") or family.max_positions)
        theta, scaling = _rope(config, max_positions)
        biases = {key for key in family.optional_biases if config.get(key)}
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            layers=_positive(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=int(config.get("head_dim") or family.head_dim or hidden_size // heads),
            max_positions=max_positions,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=family.qkv_bias or "attention_bias" in biases,
            output_bias="attention_bias" in biases,
            mlp_bias="mlp_bias" in biases,
            qk_norm=family.qk_norm,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            activation=_activation(config),
            sliding_window=_sliding_window(config, family, max_positions),
            eos_token_ids=token_ids(config.get("eos_token_id")),
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


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ArtifactError(f"config.json: {key} must be a positive integer (got {value!r})")
    return value


def _activation(config: Mapping[str, Any]) -> Literal["silu"]:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(f"the activation {activation!r} is not known", "known: silu")
    return "silu"


def _sliding_window(config: Mapping[str, Any], family: _Family, max_positions: int) -> int | None:
    if family.window_is_opt_in and not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", family.sliding_window)
    return int(window) if window and window < max_positions else None


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"a partial rotation ({partial} of each head) is not known")
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        match kind:
            case "default":
                return theta, None
            case "linear":
                return theta, RopeScaling("linear", float(rope["factor"]))
            case "llama3":
                return theta, RopeScaling(
                    "llama3",
                    float(rope["factor"]),
                    float(rope["low_freq_factor"]),
                    float(rope["high_freq_factor"]),
                    int(rope.get("original_max_position_embeddings") or max_positions),
                )
    except KeyError as missing:
        raise ArtifactError(f"config.json: rope scaling {kind!r} lacks {missing}") from None
    raise UnsupportedError(
        f"the rope scaling {kind!r} is not known", "known: default, linear, llama3"
    )
