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
    bits_per_character: float
    tokens_per_s: float
    """Tokens scored per second by this model."""
    memory_bytes: int
    """Weights resident while evaluating."""
    baseline: BaselineQuality | None = None
    delta_nll: float | None = None
    """ln(perplexity / baseline perplexity)."""
    kl_divergence: float | None = None
    """Mean KL(baseline || model), nats per token."""
    top1_agreement: float | None = None
    """Share of positions whose most likely token is the baseline's."""
