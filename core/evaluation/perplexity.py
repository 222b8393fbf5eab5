"""Perplexity over a token stream: which tokens are scored, and how surprised the model was."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.core.errors import UsageError

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Window:
    """The model reads tokens [start, stop); the token at p predicts token p + 1.

    Only predictions from `first` on are scored: those before it were scored by an earlier window.
    """

    start: int
    first: int
    stop: int

    @property
    def scored(self) -> int:
        return self.stop - self.first


def windows(tokens: int, context: int, stride: int) -> tuple[Window, ...]:
    """Windows of `context` tokens, `stride` apart, that score every token but the first just once.

    The first window scores all its predictions, each later one its last `stride`; the last window
    may be shorter. Raises UsageError where no window fits.
    """
    assert stride <= context, "tokens would be skipped"
    if tokens < context + 1:
        raise UsageError(
            f"the text has {tokens} tokens: too few for a window of {context} and the token after",
            f"use a longer text or --context {max(tokens - 1, 2)}",
        )
    found: list[Window] = []
    start = first = 0
    while first < tokens - 1:
        stop = min(start + context, tokens - 1)
        found.append(Window(start, first, stop))
        first, start = stop, start + stride
    return tuple(found)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose float32 logits take about 64 MB each."""
    step = max(1, _CHUNK_BYTES // (4 * vocabulary))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, in float64 [T]; logits [T, V] of any dtype, targets int64 [T].

    The log-sum-exp is taken in float32, a chunk of rows at a time.
    """
    result = torch.empty(len(targets), dtype=torch.float64)
    for rows in row_chunks(*logits.shape):
        chunk = logits[rows].float()
        chosen = chunk.gather(1, targets[rows, None]).squeeze(1)
        result[rows] = (chunk.logsumexp(1) - chosen).double().cpu()
    return result


def perplexity(nll: float) -> float:
    """exp of the mean NLL; infinite where it overflows."""
    return math.exp(nll) if nll < 709 else math.inf
