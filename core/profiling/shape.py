"""What the static profile must know of a model: sizes, layer by layer, from its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infopt.core.models.config import ModelConfig, positive

_SCALE_BYTES = 4
MLA = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
"""Architectures of latent attention, which the profile knows and the runtime does not."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Elements of a layer's matrices, and what attention costs in it."""

    qkv: int
    """All that leads to queries, keys and values."""
    o: int
    wide: int
    """Into the MLP that every token takes: a plain one, or the shared experts."""
    down: int
    pair_flops: int
    """FLOPs of one query-key pair over all heads, scores and values."""
    kv_vectors: int
    """Vectors that are cached of a token."""
    kv_width: int
    """Elements of each."""
    window: int | None = None
    """Tokens looked back on, itself included; None: all."""
    kv_up: int = 0
    """Of `qkv`, what expands a cached latent into keys and values (MLA, arXiv 2405.04434)."""
    latent_pair_flops: int = 0
    """FLOPs of a pair where queries are taken to the latent instead; 0 where there is none."""
    router: int = 0
    experts: int = 0
    per_token: int = 0
    expert: int = 0
    """Elements of one routed expert."""

    def kv_bytes(self, dtype_bytes: int, *, in_8_bits: bool = False) -> int:
        """Bytes cached of one token: in 8 bits a vector's elements, up to a multiple of 4, and its
        float32 scale."""
        if in_8_bits:
            return self.kv_vectors * (-(-self.kv_width // 4) * 4 + _SCALE_BYTES)
        return self.kv_vectors * self.kv_width * dtype_bytes

    def pairs(self, tokens: int) -> int:
        """Query-key pairs of a sequence's first tokens: the sum of min(i, window)."""
        window = min(tokens, self.window or tokens)
        return window * (window + 1) // 2 + (tokens - window) * window

    def attention_flops(self, past: int, new: int) -> int:
        """Of `new` tokens after `past` ones; latents are expanded where that is cheaper."""
        pairs = self.pairs(past + new) - self.pairs(past)
        if not self.latent_pair_flops:
            return pairs * self.pair_flops
        # `kv_up` of the new tokens is counted with the projections, in either manner.
        expanded = pairs * self.pair_flops + 2 * self.kv_up * past
        return min(expanded, pairs * self.latent_pair_flops)

    def experts_read(self, tokens: int) -> float:
        """Distinct experts that `tokens` are routed to, expected where all are equally likely."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - (1.0 - self.per_token / self.experts) ** tokens)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only model as the profile sees it."""

    architecture: str
    vocab_size: int
    hidden_size: int
    embedding_size: int
    max_positions: int
    position_rows: int
    """Rows of the table of learned positions; 0 where there is none."""
    tied_embeddings: bool
    layers: tuple[LayerShape, ...]
    attention_width: int
    """Elements of a token's queries, keys, values and attended values."""
    mlp_width: int
    """Inner elements of the MLP that a token takes, all its experts together."""
    vectors: Mapping[str, int] = field(default_factory=dict)
    """Elements of norms and biases, by operator."""


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Read a config.json; raises UnsupportedError for an architecture that is not known."""
    if (config.get("architectures") or [""])[0] in MLA:
        return _latent(config)
    return _plain(ModelConfig.from_hf(config))


def _plain(config: ModelConfig) -> ModelShape:
    hidden, wide = config.hidden_size, config.heads * config.head_dim
    narrow = config.kv_heads * config.head_dim
    gates = 2 if config.gated else 1
    experts = config.experts
    layers = []
    for index, window in enumerate(config.windows):
        routed = experts if experts is not None and experts.layers[index] else None
        inner = 0 if routed else config.intermediate_size
        layers.append(
            LayerShape(
                qkv=hidden * (wide + 2 * narrow),
                o=wide * hidden,
                wide=gates * hidden * inner,
                down=inner * hidden,
                pair_flops=4 * wide,
                kv_vectors=2 * config.kv_heads,
                kv_width=config.head_dim,
                window=window,
                router=routed.count * hidden if routed else 0,
                experts=routed.count if routed else 0,
                per_token=routed.per_token if routed else 0,
                expert=3 * hidden * routed.intermediate_size if routed else 0,
            )
        )
    active = experts.per_token * experts.intermediate_size if experts else 0
    rows = config.max_positions + config.position_offset if config.rope is None else 0
    return ModelShape(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        embedding_size=config.embedding_size,
        max_positions=config.max_positions,
        position_rows=rows,
        tied_embeddings=config.tied_embeddings,
        layers=tuple(layers),
        attention_width=2 * wide + 2 * narrow,
        mlp_width=max(config.intermediate_size, active),
        vectors=_vectors(config),
    )


def _vectors(config: ModelConfig) -> dict[str, int]:
    """Norms and biases."""
    hidden, layers = config.hidden_size, config.layers
    norm = 2 * hidden if config.norm == "layer" else hidden
    names = config.names
    each = 2 + sum(bool(name) for name in (names.attention_norm, names.mlp_out_norm))
    heads = 2 * config.head_dim if config.qk_norm else 0
    found = {"norms": layers * (each * norm + heads) + config.final_norm * norm}
    if "qkv" in config.biases:
        found["qkv"] = layers * (config.heads + 2 * config.kv_heads) * config.head_dim
    if "output" in config.biases:
        found["o"] = layers * hidden
    if "mlp" in config.biases:
        found["gate_up"] = layers * (2 if config.gated else 1) * config.intermediate_size
        found["down"] = layers * hidden
    return found


def _latent(config: Mapping[str, Any]) -> ModelShape:
    """DeepSeek-V2 and -V3: multi-head latent attention, and experts after the first layers."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    rank, rope = positive(config, "kv_lora_rank"), positive(config, "qk_rope_head_dim")
    nope, value = positive(config, "qk_nope_head_dim"), positive(config, "v_head_dim")
    count = positive(config, "num_hidden_layers")
    q_rank = config.get("q_lora_rank")
    queries = heads * (nope + rope)
    q = hidden * q_rank + q_rank * queries if q_rank else hidden * queries
    kv_up = rank * heads * (nope + value)
    inner = positive(config, "moe_intermediate_size") if config.get("n_routed_experts") else 0
    experts = int(config.get("n_routed_experts") or 0)
    per_token = int(config.get("num_experts_per_tok") or 0) if experts else 0
    shared = int(config.get("n_shared_experts") or 0) * inner
    first = int(config.get("first_k_dense_replace") or 0) if experts else count
    every = int(config.get("moe_layer_freq") or 1)
    dense = positive(config, "intermediate_size")

    def layer(index: int) -> LayerShape:
        routed = bool(experts) and index >= first and index % every == 0
        width = shared if routed else dense
        return LayerShape(
            qkv=q + hidden * (rank + rope) + kv_up,
            o=heads * value * hidden,
            wide=2 * hidden * width,
            down=width * hidden,
            pair_flops=2 * heads * (nope + rope + value),
            kv_vectors=1,
            kv_width=rank + rope,
            kv_up=kv_up,
            latent_pair_flops=2 * heads * (2 * rank + rope),
            router=experts * hidden if routed else 0,
            experts=experts if routed else 0,
            per_token=per_token if routed else 0,
            expert=3 * hidden * inner if routed else 0,
        )

    norms = count * (2 * hidden + rank + (q_rank or 0)) + hidden
    vectors = {"norms": norms}
    if config.get("attention_bias"):
        vectors |= {"qkv": count * ((q_rank or 0) + rank + rope), "o": count * hidden}
    return ModelShape(
        architecture=str(config["architectures"][0]),
        vocab_size=positive(config, "vocab_size"),
        hidden_size=hidden,
        embedding_size=hidden,
        max_positions=positive(config, "max_position_embeddings"),
        position_rows=0,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        layers=tuple(layer(index) for index in range(count)),
        attention_width=heads * (2 * (nope + rope) + 2 * value),
        mlp_width=max(dense, per_token * inner + shared),
        vectors=vectors,
    )
