"""The beams of one request: they share blocks as they share tokens, and go on all together."""

import torch
from torch import Tensor

from infopt.core.runtime.beam_search import BeamRules, BeamSearch
from infopt.core.runtime.request import Request, StepOutput
from infopt.core.runtime.scheduler import Scheduler


class BeamGroup:
    """A search and the requests that compute its beams, in their order.

    Each beam's log probabilities are held until those of all are there: where not all fit into the
    pool at once, they are computed in turn.
    """

    def __init__(self, first: Request) -> None:
        params = first.params
        self.search = BeamSearch(
            BeamRules(
                width=params.beam_width,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                ends=first.ends,
                longest=first.max_length - len(first.tokens),
            )
        )
        self.members = [first]
        self._first = first
        self._held: dict[Request, Tensor] = {}
        self._forked = 0

    def hold(self, request: Request, logits: Tensor) -> bool:
        """Keep one beam's logits [vocabulary]; False where they are not finite."""
        self._held[request] = logits.float().log_softmax(-1).cpu()
        return bool(torch.isfinite(self._held[request]).all())

    def answers(self) -> list[StepOutput]:
        """The best of what the search found, each said at once; an end token is left out."""
        first, ends = self._first, self.search.rules.ends
        outputs = []
        for index, found in enumerate(self.search.complete[: first.params.n]):
            ended = found.tokens[-1] in ends
            outputs.append(
                StepOutput(
                    first.request_id,
                    found.tokens[:-1] if ended else found.tokens,
                    "stop" if ended else "length",
                    index=index,
                )
            )
        return outputs

    @property
    def is_ready(self) -> bool:
        return len(self._held) == len(self.members)

    def advance(self, scheduler: Scheduler) -> tuple[list[Request], list[Request]]:
        """Choose the next beams; returns the requests that are new and those that are no more."""
        rows = torch.stack([self._held[member] for member in self.members])
        self._held.clear()
        before, parents = self.members, self.search.advance(rows)
        self.members, born = [], []
        for parent in (before[index] for index in parents):
            if parent not in self.members:
                self.members.append(parent)
            else:
                self._forked += 1
                born.append(parent.fork(self._forked))
                scheduler.fork(parent, born[-1])
                self.members.append(born[-1])
        for member, beam in zip(self.members, self.search.beams, strict=True):
            member.tokens.append(beam.tokens[-1])
            scheduler.resume(member)
        return born, [member for member in before if member not in self.members]
