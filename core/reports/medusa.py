"""The report of `infopt distill --medusa-heads`."""

from typing import Literal

from infopt.core.reports.schema import Record, Report


class HeadAccuracy(Record):
    """How often a head guesses a token right on held-out text, as shares of its positions."""

    head: int
    """0 is the base's own, which predicts the next token; head k predicts the one k further on."""
    top1: float
    """Its first guess is the text's token."""
    top5: float
    """The text's token is among its first five guesses."""
    unigram_top1: float
    """The same for guessing the commonest token of the training text every time."""
    unigram_top5: float
    agreement: float | None
    """Its first guess is what the base model itself finds likeliest once it has seen the text up to
    there; None for the base."""


class HeldOutLoss(Record):
    """The loss on held-out windows after so many steps."""

    step: int
    loss: float


class MedusaReport(Report):
    command: str = "distill"
    output: str
    medusa_heads: int
    medusa_layers: int
    projection: Literal["shared", "own"]
    targets: Literal["greedy", "text"]
    base_fingerprint: str
    parameters: int
    """Of all heads."""
    vocabulary: int
    """Tokens that heads choose among."""
    covered: float
    """The share of the held-out text's tokens that are among them."""
    bytes: int
    """Of the heads' file."""
    steps: int
    training_tokens: int
    resumed_steps: int
    stopped: str | None = None
    """Why the training ended before its last step."""
    losses: tuple[float, ...]
    """The weighted loss of each step."""
    held_out: tuple[HeldOutLoss, ...]
    held_out_tokens: int
    """Of the evaluation text, on which accuracies were counted."""
    heads: tuple[HeadAccuracy, ...]
    mean_run: float
    """How many heads in a row, from the first, guess what the base finds likeliest at the held-out
    text's positions: tokens that a step of verification would gain there."""
    seconds: float
    peak_memory_bytes: int
