"""The report of `infopt convert --kv-heads`."""

from infopt.core.reports.schema import Record, Report


class KvLayer(Record):
    """One tensor of which key/value heads were joined."""

    name: str
    spread: float
    """How far its heads were from the mean of their group: ||W - mean||^2 / ||W||^2."""


class KvPerplexity(Record):
    """On held-out text."""

    dense: float
    """Of the model as it was."""
    converted: float
    """With joined heads, before any training."""
    uptrained: float | None = None


class UptrainLoss(Record):
    """Nats a token on held-out windows of the training's text, after so many steps."""

    step: int
    loss: float


class KvHeadsReport(Report):
    command: str = "convert"
    output: str
    kv_heads: int
    original_kv_heads: int
    query_heads: int
    kv_bytes_per_token: int
    """Keys and values of one token over all layers, in the dtype of the weights."""
    original_kv_bytes_per_token: int
    perplexity: KvPerplexity
    uptrain_steps: int
    training_tokens: int
    resumed_steps: int
    losses: tuple[float, ...]
    """Of each step of the uptraining."""
    held_out: tuple[UptrainLoss, ...]
    layers: tuple[KvLayer, ...]
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    logits_max_difference: float
    """Between the artifact read back from disk and what was computed in memory."""
    seconds: float
    peak_memory_bytes: int
