"""The report of `infopt prune`."""

from typing import Literal

from infopt.core.reports.schema import Record, Report


class PrunedPart(Record):
    """One part of the model that something was removed from: a linear layer's weights, or for
    structured pruning its blocks, a block's heads or channels, or the hidden width."""

    name: str
    """A layer's or block's full name; 'layers' or 'hidden' where the whole model is meant."""
    kind: Literal["weights", "layers", "heads", "ffn", "hidden"] = "weights"
    total: int
    """Weights, blocks, heads or channels before."""
    removed: int
    error: float | None = None
    """Relative output error ||(W - P) X||^2 / ||W X||^2 on the calibration text; a method that sees
    no text has the weight's own: ||W - P||^2 / ||W||^2."""
    magnitude_error: float | None = None
    """The same for removing as many of the layer's smallest weights."""
    damp: float = 0.0
    """Share of the mean diagonal that was added before the Cholesky factorization succeeded."""
    fallback: str | None = None
    """What was fallen back to, where it had to be."""
    gone: tuple[int, ...] = ()
    """Which blocks, KV groups or channels were removed, by their numbers in the original; empty
    for weights."""
    seconds: float = 0.0
    tokens: int = 0
    """Rows of calibration inputs that this part was judged by."""


class PrunePerplexity(Record):
    """On held-out text."""

    dense: float
    pruned: float
    recovered: float | None = None
    """After retraining, where there was any."""


class HeldOut(Record):
    """The mean negative log-likelihood of held-out windows of the training text, nats a token."""

    step: int
    nll: float


class Retraining(Record):
    """How the pruned model was trained."""

    steps: int
    tokens: int
    seconds: float
    source: Literal["dense", "text"]
    """What it learned from."""
    losses: tuple[float, ...]
    """What was minimized, step by step."""
    held_out: tuple[HeldOut, ...]
    stopped: str | None = None
    """Why it ended before its last step, where it did."""
    resumed_steps: int = 0
    recovered_share: float | None = None
    """Of the nats a token lost by pruning, on the text of `perplexity`."""

    @property
    def source_words(self) -> str:
        """What it learned from, for people."""
        return "dense model" if self.source == "dense" else "text"


class PruneReport(Report):
    command: str = "prune"
    output: str
    method: str
    pattern: str | None
    """Of unstructured sparsity: a share, or N:M with N kept of every M."""
    allocation: str | None = None
    sparsity: float
    """Share of zeros among the weights of the pruned layers, counted in the artifact; of structured
    pruning, the share of the model's parameters that are gone."""
    parameters: int
    original_parameters: int
    bytes: int
    """Of the written weight files."""
    original_bytes: int
    perplexity: PrunePerplexity
    calibration_tokens: int
    resumed_blocks: int
    seconds: float
    peak_memory_bytes: int
    logits_max_difference: float | None
    """Between the artifact read back from disk and the weights as they were computed; None where
    there was nothing to compare with."""
    retraining: Retraining | None = None
    layers: tuple[PrunedPart, ...]
