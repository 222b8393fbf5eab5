"""Beam search over log probabilities, beam for beam as transformers has it; knows no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class BeamRules:
    """What to search for."""

    width: int
    length_penalty: float
    """Sums of log probabilities are divided by the length to this power."""
    early_stopping: EarlyStopping
    """True: stop with `width` complete answers. False: and when the best beam, as long as it is, is
    no better than the worst of them. "never": and when it cannot become better."""
    ends: frozenset[int]
    longest: int
    """Tokens of an answer, at most."""


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer on its way: tokens so far, and the sum of their log probabilities (a scalar)."""

    tokens: tuple[int, ...]
    score: Tensor


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A complete answer, an end token included, and its score by its length."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """`beams` are to be extended, best first, until there are none; then `complete` has `width`."""

    def __init__(self, rules: BeamRules) -> None:
        self.rules = rules
        self.beams = [Beam((), torch.zeros(()))]
        self.complete: list[Hypothesis] = []
        """Best first."""

    def advance(self, logprobs: Tensor) -> list[int]:
        """Extend by log probabilities float32 [beams, vocabulary]; returns each new beam's parent.

        Of the best candidates over all beams, those that end are complete if they are among the
        first `width`; the others go on. There are as many candidates as it takes for `width` to go
        on whatever ends.
        """
        rules, vocabulary = self.rules, logprobs.shape[1]
        sums = logprobs + torch.stack([beam.score for beam in self.beams])[:, None]
        kept = max(2, 1 + len(rules.ends)) * rules.width
        values, places = sums.flatten().topk(min(kept, sums.numel()))
        length = len(self.beams[0].tokens) + 1
        running: list[tuple[int, Beam]] = []
        for rank, place in enumerate(places.tolist()):
            parent, token = divmod(place, vocabulary)
            beam = Beam((*self.beams[parent].tokens, token), values[rank])
            if token not in rules.ends and length < rules.longest:
                running.append((parent, beam))
            elif rank < rules.width:
                score = float(values[rank] / length**rules.length_penalty)
                self.complete.append(Hypothesis(beam.tokens, score))
        self.complete = best_first(self.complete)[: rules.width]
        if not running or self._is_over(running[0][1].score, length):
            running = []
        self.beams = [beam for _, beam in running[: rules.width]]
        return [parent for parent, _ in running[: rules.width]]

    def _is_over(self, best: Tensor, length: int) -> bool:
        rules = self.rules
        if len(self.complete) < rules.width:
            return False
        if rules.early_stopping is True:
            return True
        reachable = rules.early_stopping == "never" and rules.length_penalty > 0
        length = rules.longest if reachable else length
        return float(best / length**rules.length_penalty) <= self.complete[-1].score


def best_first(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)
