"""The report of `infopt evaluate`."""

from infopt.core.reports.schema import ModelSummary, Record, Report


class BaselineQuality(Record):
    model: ModelSummary
    perplexity: float
    nll: float


class EvaluateReport(Report):
    command: str = "evaluate"
    text: str
    text_sha256: str
    protocol: str
    """In words: windows, stride, what is scored."""
    windows: int
    context: int
    stride: int
    tokens: int
    """Tokens scored."""
    perplexity: float
    nll: float
    """Mean negative log-likelihood, nats per token."""
    characters: int
    """Characters of the scored tokens' text, special tokens left out."""
    bits_per_character: float
    tokens_per_s: float
    """Tokens read per second of this model's forward passes; scoring is not timed."""
    dtype: str
    """Of the weights and activations while evaluating."""
    memory_bytes: int
    """Weights resident while evaluating."""
    baseline: BaselineQuality | None = None
    delta_nll: float | None = None
    """ln(perplexity / baseline perplexity)."""
    kl_divergence: float | None = None
    """Mean KL(baseline || model), nats per token."""
    top1_agreement: float | None = None
    """Share of positions whose most likely token is the baseline's."""
