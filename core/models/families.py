"""What the architectures leave unsaid in a config.json, as data: names, biases, norms, windows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["qkv", "output", "mlp"]
"""Of a layer: what may have biases."""
_ATTENTION: tuple[Part, ...] = ("qkv", "output")
_ALL: tuple[Part, ...] = ("qkv", "output", "mlp")


@dataclass(frozen=True, slots=True)
class Names:
    """Where a checkpoint holds what; those of a layer follow its own name and a dot.

    Checkpoints of a base model leave the first word of each name out.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    layer: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    attention_norm: str = ""
    """Of what attention adds; '' where there is none."""
    mlp_norm: str = "post_attention_layernorm"
    wide: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """What leads into the MLP, gate first."""
    down: str = "mlp.down_proj"
    mlp_out_norm: str = ""
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Gate, up and down of one expert, after the experts' name and its number."""


@dataclass(frozen=True, slots=True)
class Family:
    """How an architecture differs from Llama."""

    names: Names = Names()
    biases: tuple[Part, ...] = ()
    bias_keys: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """The config's keys that add biases here; other architectures ignore them."""
    biased_unless_said: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    max_positions: int = 2048
    windows: Literal["none", "all", "some"] = "none"
    """Which layers look back on a window: `layer_types` tells, or else `window_pattern`."""
    sliding_window: int | None = None
    window_is_opt_in: bool = False
    window_pattern: int | None = None
    """Of so many layers, the last sees everything; None: layers from `max_window_layers` slide."""
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_eps: float = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0
    gated: bool = True
    activation: str = "silu"
    activation_key: str = "hidden_act"
    scaled_embedding: bool = False
    scaled_query: bool = False
    """Scores are divided by the root of `query_pre_attn_scalar`, not of the head's size."""
    attention_cap: float | None = None
    logit_cap: float | None = None
    tied: bool = False
    transposed: bool = False
    """Dense weights are stored [inputs, outputs]."""
    theta: float = 10000.0
    local_theta: float | None = None
    """Of windowed layers, where theirs is another."""
    longrope_by: tuple[str, ...] = ("longrope",)
    experts_key: str = ""
    """The config's key for the number of experts; '' where there are none."""
    expert_size_key: str = "intermediate_size"
    experts_per_token: int = 2
    normalized: bool | None = None
    """Whether the weights of a token's experts sum to 1; None: `norm_topk_prob` tells."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Our keys to those that this architecture's config has instead."""
    refused: Mapping[str, object] = field(default_factory=dict)
    """Keys that must have these values, or be absent."""


_GEMMA = Names(
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_OPT = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    layer="model.decoder.layers",
    norm="model.decoder.final_layer_norm",
    input_norm="self_attn_layer_norm",
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    wide=("fc1",),
    down="fc2",
)
_GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h",
    norm="transformer.ln_f",
    input_norm="ln_1",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    mlp_norm="ln_2",
    wide=("mlp.c_fc",),
    down="mlp.c_proj",
)
_CAUSAL: Mapping[str, object] = {"use_bidirectional_attention": False}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(bias_keys={"attention_bias": _ATTENTION, "mlp_bias": ("mlp",)}),
    "MistralForCausalLM": Family(max_positions=131072, windows="all", sliding_window=4096),
    "Qwen2ForCausalLM": Family(
        biases=("qkv",),
        max_positions=32768,
        windows="some",
        sliding_window=4096,
        window_is_opt_in=True,
    ),
    "Qwen3ForCausalLM": Family(
        bias_keys={"attention_bias": _ATTENTION},
        qk_norm=True,
        head_dim=128,
        max_positions=32768,
        windows="some",
        sliding_window=4096,
        window_is_opt_in=True,
    ),
    "Phi3ForCausalLM": Family(
        names=Names(qkv=("self_attn.qkv_proj",), wide=("mlp.gate_up_proj",)),
        max_positions=4096,
        windows="all",
        norm_eps=1e-5,
        longrope_by=("longrope", "su", "yarn"),
    ),
    "Gemma2ForCausalLM": Family(
        names=_GEMMA,
        bias_keys={"attention_bias": _ATTENTION},
        head_dim=256,
        max_positions=8192,
        windows="some",
        sliding_window=4096,
        window_pattern=2,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        scaled_embedding=True,
        scaled_query=True,
        attention_cap=50.0,
        logit_cap=30.0,
        tied=True,
        refused=_CAUSAL,
    ),
    "Gemma3ForCausalLM": Family(
        names=_GEMMA,
        bias_keys={"attention_bias": _ATTENTION},
        qk_norm=True,
        head_dim=256,
        max_positions=131072,
        windows="some",
        sliding_window=4096,
        window_pattern=6,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        scaled_embedding=True,
        scaled_query=True,
        tied=True,
        theta=1e6,
        local_theta=1e4,
        refused=_CAUSAL,
    ),
    "OPTForCausalLM": Family(
        names=_OPT,
        bias_keys={"enable_bias": _ALL},
        biased_unless_said=True,
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        position_offset=2,
        gated=False,
        activation="relu",
        activation_key="activation_function",
        tied=True,
        aliases={"intermediate_size": "ffn_dim"},
        refused={"layer_norm_elementwise_affine": True},
    ),
    "GPT2LMHeadModel": Family(
        names=_GPT2,
        biases=_ALL,
        norm="layer",
        norm_eps=1e-5,
        positions="learned",
        max_positions=1024,
        gated=False,
        activation="gelu_new",
        activation_key="activation_function",
        tied=True,
        transposed=True,
        aliases={
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        refused={"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True},
    ),
    "MixtralForCausalLM": Family(
        names=Names(
            router="block_sparse_moe.gate",
            experts="block_sparse_moe.experts",
            expert=("w1", "w3", "w2"),
        ),
        max_positions=131072,
        windows="all",
        norm_eps=1e-5,
        theta=1e6,
        experts_key="num_local_experts",
        normalized=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        bias_keys={"attention_bias": _ATTENTION},
        qk_norm=True,
        max_positions=32768,
        windows="all",
        sliding_window=4096,
        window_is_opt_in=True,
        experts_key="num_experts",
        expert_size_key="moe_intermediate_size",
        experts_per_token=8,
    ),
}
