"""The linear layers of a decoder by the names of its checkpoint, and their shapes."""

from infopt.core.models.config import ModelConfig

Shapes = dict[str, tuple[int, int]]


def linear_shapes(config: ModelConfig) -> Shapes:
    """[outputs, inputs] of every linear layer; experts are named apart, however they are stored."""
    names, hidden = config.names, config.hidden_size
    found: Shapes = {names.head: (config.vocab_size, config.embedding_size)}
    if config.embedding_size != hidden:
        found[names.project_in] = (hidden, config.embedding_size)
        found[names.project_out] = (config.embedding_size, hidden)
    for n in range(config.layers):
        block = _attention(config) | _mlp(config, n)
        found |= {f"{names.layer}.{n}.{part}": shape for part, shape in block.items()}
    return found


def _attention(config: ModelConfig) -> Shapes:
    names, hidden = config.names, config.hidden_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    outputs = (query, key, key) if len(names.qkv) == 3 else (query + 2 * key,)
    found = {part: (size, hidden) for part, size in zip(names.qkv, outputs, strict=True)}
    return found | {names.output: (hidden, query)}


def _mlp(config: ModelConfig, layer: int) -> Shapes:
    names, hidden, experts = config.names, config.hidden_size, config.experts
    if experts is None or not experts.layers[layer]:
        inner = config.intermediate_size
        whole = (2 if config.gated else 1) * inner
        found = {part: (whole // len(names.wide), hidden) for part in names.wide}
        return found | {names.down: (hidden, inner)}
    gate, up, down = names.expert
    found = {names.router: (experts.count, hidden)}
    for e in range(experts.count):
        own, inner = f"{names.experts}.{e}", experts.intermediate_size
        found[f"{own}.{gate}"] = found[f"{own}.{up}"] = (inner, hidden)
        found[f"{own}.{down}"] = (hidden, inner)
    return found


def takes_heads(config: ModelConfig) -> bool:
    """Whether a GPU's kernels have tiles for a model's heads."""
    return config.head_dim <= 256 and config.heads // config.kv_heads <= 64
