"""What a model needs, from its config alone: parameters, FLOPs and bytes by operator, memory.

FLOPs are those of the matrix products, two per multiply-add; attention is causal, a token attends
to itself and all before it. Prefill computes lm_head for the last position only.

    decode   2 N_mm + 4 L Hq d S                                     per sequence
    prefill  2 N_layers P + 2 V h + 4 L Hq d P (P + 1) / 2           per sequence

A layer with a sliding window attends to no more than that. Models with experts are refused: what a
step reads of them depends on where its tokens are routed.

Bytes are the least that must move: each weight once per pass, the KV cache read once and the new
entries written; of the embedding tables only the rows looked up. Hidden states are not counted.
"""

from collections.abc import Callable, Mapping

from infopt.core.artifact.headers import TensorHeader
from infopt.core.errors import UnsupportedError
from infopt.core.models.config import ModelConfig
from infopt.core.reports.profile import MemoryNeed, OperatorCost, PhaseCost, StaticProfile

OPERATORS = ("embedding", "norms", "qkv", "attention", "o", "gate_up", "down", "lm_head")

# Of a tensor's name, in the order they are tried: q_norm is a norm, not a q projection.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norms", ("norm", ".ln_", "ln_f")),
    ("positions", ("embed_positions", "wpe")),
    ("embedding", ("embed_tokens", "wte")),
    ("lm_head", ("lm_head",)),
    ("projections", ("project_in", "project_out")),
    ("qkv", ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn")),
    ("o", ("o_proj", "out_proj", "attn.c_proj")),
    ("gate_up", ("gate_proj", "up_proj", "gate_up_proj", ".fc1", "c_fc")),
    ("down", ("down_proj", ".fc2", "mlp.c_proj")),
)
TABLES = ("embedding", "positions")
"""Of these, a pass reads the rows that it looks up."""
_SCALE_BYTES = 4
# Masks that old GPT-2 checkpoints hold; nothing reads them.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def matrix_sizes(config: ModelConfig) -> dict[str, int]:
    """Elements of the weight matrices by operator, over all layers; lm_head even where tied."""
    if config.experts is not None:
        raise UnsupportedError(
            f"the static profile does not know experts ({config.architecture}): the bytes of a "
            "step depend on where its tokens are routed",
            "infopt bench measures such a model",
        )
    hidden, wide = config.hidden_size, config.heads * config.head_dim
    narrow = config.kv_heads * config.head_dim
    found = {
        "qkv": config.layers * hidden * (wide + 2 * narrow),
        "o": config.layers * wide * hidden,
        "gate_up": config.layers * (2 if config.gated else 1) * hidden * config.intermediate_size,
        "down": config.layers * config.intermediate_size * hidden,
        "lm_head": config.vocab_size * config.embedding_size,
    }
    if config.embedding_size != hidden:
        found["projections"] = 2 * hidden * config.embedding_size
    return found


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by operator, with biases and norms; a tied table is in embedding and lm_head."""
    hidden = config.hidden_size
    found = {"embedding": config.vocab_size * config.embedding_size, **matrix_sizes(config)}
    if config.rope is None:
        found["positions"] = (config.max_positions + config.position_offset) * hidden
    norm = 2 * hidden if config.norm == "layer" else hidden
    names = config.names
    each = 2 + sum(bool(name) for name in (names.attention_norm, names.mlp_out_norm))
    head_norms = 2 * config.head_dim if config.qk_norm else 0
    found["norms"] = config.layers * (each * norm + head_norms) + config.final_norm * norm
    if "qkv" in config.biases:
        found["qkv"] += config.layers * (config.heads + 2 * config.kv_heads) * config.head_dim
    if "output" in config.biases:
        found["o"] += config.layers * hidden
    if "mlp" in config.biases:
        found["gate_up"] += config.layers * (2 if config.gated else 1) * config.intermediate_size
        found["down"] += config.layers * hidden
    return found


def total(config: ModelConfig, by_operator: Mapping[str, int]) -> int:
    """The sum over the operators, a tied table counted once."""
    return sum(by_operator.values()) - (by_operator["embedding"] if config.tied_embeddings else 0)


def weight_bytes(
    config: ModelConfig, dtype_bytes: int, headers: Mapping[str, TensorHeader] | None = None
) -> dict[str, int]:
    """Bytes by operator with plain weights in the dtype of the run; from the tensors where given.

    Quantized layers count as they are stored, with their scales and zeros.
    """
    if headers is None:
        return {name: count * dtype_bytes for name, count in parameters(config).items()}
    packed = {_module(name) for name, header in headers.items() if "int" in header.dtype}
    found = dict.fromkeys(("embedding", "norms", "qkv", "o", "gate_up", "down", "lm_head"), 0)
    for name, header in headers.items():
        if name.endswith(_BUFFERS):
            continue
        stored = _module(name) in packed or header.dtype.startswith("float8")
        size = header.nbytes if stored else header.numel * dtype_bytes
        operator = operator_of(name)
        found[operator] = found.get(operator, 0) + size
    if config.tied_embeddings:  # stored under either name, or under both
        found["embedding"] = found["lm_head"] = max(found["embedding"], found["lm_head"])
    return found


def operator_of(tensor: str) -> str:
    """The operator that reads a tensor of a checkpoint; 'other' where the name says nothing."""
    for operator, words in _NAMES:
        if any(word in tensor for word in words):
            return operator
    return "other"


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int, *, kv_8bit: bool = False) -> int:
    """Keys and values of one token over all layers: 2 L Hkv d B.

    In 8 bits a head takes d bytes, up to a multiple of 4, and a float32 scale.
    """
    head = config.head_dim * dtype_bytes
    if kv_8bit:
        head = -(-config.head_dim // 4) * 4 + _SCALE_BYTES
    return 2 * config.layers * config.kv_heads * head


def kv_bytes(
    config: ModelConfig, *, batch: int, context: int, dtype_bytes: int, kv_8bit: bool = False
) -> int:
    """The cache of `batch` sequences of `context` tokens; a sliding window bounds what is kept."""
    kept = sum(min(context, window or context) for window in config.windows)
    token = kv_bytes_per_token(config, dtype_bytes, kv_8bit=kv_8bit)
    return batch * kept * token // config.layers


def attended(config: ModelConfig, tokens: int) -> int:
    """Query-key pairs of a sequence's first `tokens`, over all layers.

    Of one layer: the sum of min(i, window), i = 1..tokens.
    """
    return sum(_pairs(tokens, min(tokens, window or tokens)) for window in config.windows)


def _pairs(tokens: int, window: int) -> int:
    return window * (window + 1) // 2 + (tokens - window) * window


def phase_cost(
    config: ModelConfig,
    weights: Mapping[str, int],
    *,
    batch: int,
    past: int,
    new: int,
    dtype_bytes: int,
    kv_8bit: bool = False,
) -> PhaseCost:
    """One pass of `new` tokens a sequence over `past` cached: decode is new=1, prefill past=0."""
    sizes = matrix_sizes(config)
    pairs = attended(config, past + new) - attended(config, past)
    flops = {name: 2.0 * size * batch * new for name, size in sizes.items()}
    flops["lm_head"] = 2.0 * sizes["lm_head"] * batch
    flops["attention"] = 4.0 * config.heads * config.head_dim * pairs * batch
    read = dict(weights)
    rows = min(batch * new, config.vocab_size)
    read["embedding"] = weights["embedding"] * rows // config.vocab_size
    if "positions" in weights:
        stored = config.max_positions + config.position_offset
        read["positions"] = weights["positions"] * min(batch * new, stored) // stored
    cached = sum(min(past, window - 1) if window else past for window in config.windows)
    tokens = cached + 2 * new * config.layers
    token = kv_bytes_per_token(config, dtype_bytes, kv_8bit=kv_8bit)
    moved = batch * tokens * token // config.layers
    names = [*OPERATORS, *(name for name in weights if name not in OPERATORS)]
    operators = tuple(
        OperatorCost(
            name=name,
            flops=flops.get(name, 0.0),
            weight_bytes=float(read.get(name, 0)),
            activation_bytes=float(moved) if name == "attention" else 0.0,
        )
        for name in names
    )
    return PhaseCost(
        tokens=batch * new,
        flops=sum(o.flops for o in operators),
        bytes=sum(o.weight_bytes + o.activation_bytes for o in operators),
        operators=operators,
    )


def memory_need(
    config: ModelConfig,
    resident: int,
    *,
    batch: int,
    context: int,
    step_tokens: int,
    dtype_bytes: int,
    reserve: int,
    kv_8bit: bool = False,
) -> MemoryNeed:
    """Bytes while serving `batch` sequences of `context` tokens, `step_tokens` computed at a time.

    Activations are the widest point of one layer; logits are held in the dtype and in float32.
    """
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    widest = 2 * config.hidden_size + max(attention, 3 * config.intermediate_size)
    need = {
        "weights": resident,
        "kv_cache": kv_bytes(
            config, batch=batch, context=context, dtype_bytes=dtype_bytes, kv_8bit=kv_8bit
        ),
        "activations": max(step_tokens, batch) * widest * dtype_bytes,
        "logits": batch * config.vocab_size * (dtype_bytes + 4),
        "reserve": reserve,
    }
    return MemoryNeed(**need, total=sum(need.values()))


def static_profile(
    config: ModelConfig,
    *,
    dtype: str,
    batch: int,
    prompt_tokens: int,
    context: int,
    device_memory: int,
    step_tokens: int = 512,
    reserve: int = 0,
    headers: Mapping[str, TensorHeader] | None = None,
    kv_8bit: bool = False,
) -> StaticProfile:
    """Everything that the config tells of prefill(batch, prompt_tokens) and of decode at `context`.

    The decode step attends to `context` positions, its own included. `kv_8bit`: keys and values
    are cached in 8 bits.
    """
    width = dtype_size(dtype)
    weights = weight_bytes(config, width, headers)
    resident = total(config, weights)
    counts = parameters(config)

    def need(size: int) -> MemoryNeed:
        return memory_need(
            config,
            resident,
            batch=size,
            context=context,
            step_tokens=min(step_tokens, size * prompt_tokens),
            dtype_bytes=width,
            reserve=reserve,
            kv_8bit=kv_8bit,
        )

    def cost(past: int, new: int) -> PhaseCost:
        return phase_cost(
            config, weights, batch=batch, past=past, new=new, dtype_bytes=width, kv_8bit=kv_8bit
        )

    memory = need(batch)
    return StaticProfile(
        dtype=dtype,
        parameters=total(config, counts),
        parameters_without_embedding=sum(counts.values()) - counts["embedding"],
        weight_bytes=resident,
        kv_bytes_per_token=kv_bytes_per_token(config, width, kv_8bit=kv_8bit),
        batch=batch,
        context=context,
        kv_bytes=memory.kv_cache,
        memory=memory,
        memory_bytes=memory.total,
        device_memory_bytes=device_memory,
        fits=memory.total <= device_memory,
        largest_batch=_largest(lambda size: need(size).total <= device_memory),
        prefill=cost(0, prompt_tokens),
        decode=cost(context - 1, 1),
    )


def dtype_size(dtype: str) -> int:
    """Bytes of one element of a run's dtype."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest batch that fits, found by doubling and halving; 0 if none does."""
    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
