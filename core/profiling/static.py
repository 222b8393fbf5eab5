"""What a model needs, from its config alone: parameters, FLOPs and bytes by operator, memory.

FLOPs are those of the matrix products, two per multiply-add; attention is causal, a token attends
to itself and all before it. Prefill computes lm_head for the last position only.

    decode   2 N_mm + 4 L Hq d S                                     per sequence
    prefill  2 N_layers P + 2 V h + 4 L Hq d P (P + 1) / 2           per sequence

A layer with a sliding window attends to no more than that. Of experts, N counts those that a token
is routed to. With latent attention (MLA) a pair costs what is less: 2 H (2 rank + rope) with the
queries taken to the latent, or 2 H (d_qk + d_v) and the expansion of the latents before.

Bytes are the least that must move: each weight once per pass, the KV cache read once and the new
entries written; of the embedding tables only the rows looked up, of experts those that the tokens
are expected to reach if all are equally likely: E (1 - (1 - k/E)^tokens). Hidden states are not
counted.
"""

from collections.abc import Callable, Mapping

from infopt.core.artifact.headers import TensorHeader
from infopt.core.profiling.shape import ModelShape
from infopt.core.reports.profile import MemoryNeed, OperatorCost, PhaseCost, StaticProfile

OPERATORS = ("embedding", "norms", "qkv", "attention", "o", "gate_up", "down", "lm_head")

# Of a tensor's name, in the order they are tried: q_norm is a norm, not a q projection.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norms", ("norm", ".ln_", "ln_f")),
    ("positions", ("embed_positions", "wpe")),
    ("embedding", ("embed_tokens", "wte")),
    ("lm_head", ("lm_head",)),
    ("projections", ("project_in", "project_out")),
    ("experts", (".experts.",)),
    ("router", (".gate.",)),
    ("qkv", ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "q_a_proj", "q_b_proj", "kv_")),
    ("o", ("o_proj", "out_proj", "attn.c_proj")),
    ("gate_up", ("gate_proj", "up_proj", "gate_up_proj", ".fc1", "c_fc")),
    ("down", ("down_proj", ".fc2", "mlp.c_proj")),
)
TABLES = ("embedding", "positions")
"""Of these, a pass reads the rows that it looks up."""
PACKABLE = frozenset({"qkv", "o", "gate_up", "down", "experts"})
"""What quantization stores in fewer bits."""
# Masks that old GPT-2 checkpoints hold; nothing reads them.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


def matrix_sizes(shape: ModelShape) -> dict[str, int]:
    """Elements of the weight matrices by operator, over all layers; lm_head even where tied."""
    layers = shape.layers
    found = {
        "qkv": sum(layer.qkv for layer in layers),
        "o": sum(layer.o for layer in layers),
        "gate_up": sum(layer.wide for layer in layers),
        "down": sum(layer.down for layer in layers),
        "lm_head": shape.vocab_size * shape.embedding_size,
    }
    if any(layer.experts for layer in layers):
        found["router"] = sum(layer.router for layer in layers)
        found["experts"] = sum(layer.experts * layer.expert for layer in layers)
    if shape.embedding_size != shape.hidden_size:
        found["projections"] = 2 * shape.hidden_size * shape.embedding_size
    return found


def active_sizes(shape: ModelShape) -> dict[str, int]:
    """The same, of experts those that one token is routed to."""
    found = matrix_sizes(shape)
    if "experts" in found:
        found["experts"] = sum(layer.per_token * layer.expert for layer in shape.layers)
    return found


def parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters by operator, with biases and norms; a tied table is in embedding and lm_head."""
    found = {"embedding": shape.vocab_size * shape.embedding_size, **matrix_sizes(shape)}
    if shape.position_rows:
        found["positions"] = shape.position_rows * shape.hidden_size
    for name, count in shape.vectors.items():
        found[name] = found.get(name, 0) + count
    return found


def total(shape: ModelShape, by_operator: Mapping[str, int]) -> int:
    """The sum over the operators, a tied table counted once."""
    return sum(by_operator.values()) - (by_operator["embedding"] if shape.tied_embeddings else 0)


def weight_bytes(
    shape: ModelShape,
    dtype_bytes: int,
    headers: Mapping[str, TensorHeader] | None = None,
    bits: float | None = None,
) -> dict[str, int]:
    """Bytes by operator with plain weights in the dtype of the run; from the tensors where given.

    Quantized layers count as they are stored, with their scales and zeros; where only a config is
    there, with `bits` a weight.
    """
    if headers is None:
        wide = 8.0 * dtype_bytes
        each = {
            name: wide if bits is None or name not in PACKABLE else bits
            for name in parameters(shape)
        }
        return {name: int(count * each[name] / 8) for name, count in parameters(shape).items()}
    packed = {_module(name) for name, header in headers.items() if "int" in header.dtype}
    found = dict.fromkeys(("embedding", "norms", "qkv", "o", "gate_up", "down", "lm_head"), 0)
    for name, header in headers.items():
        if name.endswith(_BUFFERS):
            continue
        stored = _module(name) in packed or header.dtype.startswith("float8")
        size = header.nbytes if stored else header.numel * dtype_bytes
        operator = operator_of(name)
        found[operator] = found.get(operator, 0) + size
    if shape.tied_embeddings:  # stored under either name, or under both
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


def kv_bytes_per_token(shape: ModelShape, dtype_bytes: int, *, kv_8bit: bool = False) -> int:
    """What is cached of one token over all layers: 2 L Hkv d B; MLA: L (rank + rope) B.

    In 8 bits a vector takes its elements, up to a multiple of 4, and a float32 scale.
    """
    return sum(layer.kv_bytes(dtype_bytes, in_8_bits=kv_8bit) for layer in shape.layers)


def kv_bytes(
    shape: ModelShape, *, batch: int, context: int, dtype_bytes: int, kv_8bit: bool = False
) -> int:
    """The cache of `batch` sequences of `context` tokens; a sliding window bounds what is kept."""
    return batch * sum(
        min(context, layer.window or context) * layer.kv_bytes(dtype_bytes, in_8_bits=kv_8bit)
        for layer in shape.layers
    )


def attended(shape: ModelShape, tokens: int) -> int:
    """Query-key pairs of a sequence's first `tokens`, over all layers.

    Of one layer: the sum of min(i, window), i = 1..tokens.
    """
    return sum(layer.pairs(tokens) for layer in shape.layers)


def phase_cost(
    shape: ModelShape,
    weights: Mapping[str, int],
    *,
    batch: int,
    past: int,
    new: int,
    dtype_bytes: int,
    kv_8bit: bool = False,
) -> PhaseCost:
    """One pass of `new` tokens a sequence over `past` cached: decode is new=1, prefill past=0."""
    flops = {name: 2.0 * size * batch * new for name, size in active_sizes(shape).items()}
    flops["lm_head"] = 2.0 * shape.vocab_size * shape.embedding_size * batch
    flops["attention"] = float(batch * sum(la.attention_flops(past, new) for la in shape.layers))
    read: dict[str, float] = dict(weights)
    read["embedding"] = weights["embedding"] * min(batch * new, shape.vocab_size) / shape.vocab_size
    if "positions" in weights:
        rows = min(batch * new, shape.position_rows)
        read["positions"] = weights["positions"] * rows / shape.position_rows
    if "experts" in weights:
        there = sum(layer.experts for layer in shape.layers)
        reached = sum(layer.experts_read(batch * new) for layer in shape.layers)
        read["experts"] = weights["experts"] * reached / there
    moved = batch * sum(
        (min(past, layer.window - 1 if layer.window else past) + 2 * new)
        * layer.kv_bytes(dtype_bytes, in_8_bits=kv_8bit)
        for layer in shape.layers
    )
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
    shape: ModelShape,
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
    widest = 2 * shape.hidden_size + max(shape.attention_width, 3 * shape.mlp_width)
    need = {
        "weights": resident,
        "kv_cache": kv_bytes(
            shape, batch=batch, context=context, dtype_bytes=dtype_bytes, kv_8bit=kv_8bit
        ),
        "activations": max(step_tokens, batch) * widest * dtype_bytes,
        "logits": batch * shape.vocab_size * (dtype_bytes + 4),
        "reserve": reserve,
    }
    return MemoryNeed(**need, total=sum(need.values()))


def static_profile(
    shape: ModelShape,
    *,
    dtype: str,
    batch: int,
    prompt_tokens: int,
    context: int,
    device_memory: int,
    step_tokens: int = 512,
    reserve: int = 0,
    headers: Mapping[str, TensorHeader] | None = None,
    bits: float | None = None,
    kv_8bit: bool = False,
) -> StaticProfile:
    """What the config tells of prefill(batch, prompt_tokens) and of decode at `context`.

    The decode step attends to `context` positions, its own included. `kv_8bit`: keys and values
    are cached in 8 bits. `bits`: of a weight in the layers, where there are no `headers`.
    """
    width = dtype_size(dtype)
    weights = weight_bytes(shape, width, headers, bits)
    resident = total(shape, weights)
    counts = parameters(shape)

    def need(size: int) -> MemoryNeed:
        return memory_need(
            shape,
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
            shape, weights, batch=batch, past=past, new=new, dtype_bytes=width, kv_8bit=kv_8bit
        )

    def fits(length: int) -> bool:
        cached = kv_bytes(shape, batch=batch, context=length, dtype_bytes=width, kv_8bit=kv_8bit)
        other = memory.total - memory.kv_cache
        return length <= shape.max_positions and other + cached <= device_memory

    memory = need(batch)
    idle = matrix_sizes(shape).get("experts", 0) - active_sizes(shape).get("experts", 0)
    return StaticProfile(
        dtype=dtype,
        parameters=total(shape, counts),
        parameters_without_embedding=sum(counts.values()) - counts["embedding"],
        active_parameters=total(shape, counts) - idle,
        weight_bytes=resident,
        kv_bytes_per_token=kv_bytes_per_token(shape, width, kv_8bit=kv_8bit),
        batch=batch,
        prompt_tokens=prompt_tokens,
        context=context,
        kv_bytes=memory.kv_cache,
        memory=memory,
        memory_bytes=memory.total,
        device_memory_bytes=device_memory,
        fits=memory.total <= device_memory,
        largest_batch=largest(lambda size: need(size).total <= device_memory),
        longest_context=largest(fits),
        prefill=cost(0, prompt_tokens),
        decode=cost(context - 1, 1),
    )


def dtype_size(dtype: str) -> int:
    """Bytes of one element of a run's dtype."""
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, found by doubling and halving; 0 if none does."""
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
