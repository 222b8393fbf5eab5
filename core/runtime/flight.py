"""Steps that are left to run while the next one is prepared: nobody waits for their tokens yet.

The tokens of step n stay on the device and are gathered there as inputs of step n + 1, which is
scheduled, built and launched before the host reads them. Lengths are known ahead; that a token ends
an answer is seen one step late, and what that step computed of the answer is thrown away.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.core.runtime.batch import Batch, build_batch
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.penalties import changes_logits
from infopt.core.runtime.request import Request
from infopt.core.runtime.sampler import Chosen, draw_for
from infopt.core.runtime.scheduler import Scheduler, Step

Times = tuple[float, float, float, float]
"""When a step began to be scheduled, was scheduled, was built and was launched."""
UNKNOWN = 0
"""Stands in a request's tokens for one that is chosen and not read yet."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step whose kernels are launched and whose tokens are not read."""

    step: Step
    batch: Batch
    chosen: Chosen
    """A token for each row of `batch.sampling`."""
    times: Times

    @property
    def requests(self) -> list[Request]:
        """Who gets the tokens, in their order."""
        return [item.request for item in self.batch.sampling]


def may_fly(batch: Batch, step: Step) -> bool:
    """Whether a step's tokens need not be known for the next step to be prepared.

    They must be where a grammar, a penalty or beams decide by them, where their likelihood is told,
    and where a prompt has still to be computed, read or forked into answers.
    """
    if len(batch.sampling) < len(step.work) or batch.reading:
        return False
    return all(_is_plain(item.request) for item in batch.sampling)


def _is_plain(request: Request) -> bool:
    params, answered = request.params, len(request.tokens) - request.prompt_length
    decides = request.constraint is not None or changes_logits(params)
    told = params.logprobs is not None or answered < params.min_tokens
    return not (decides or told or request.forks or params.beam_width > 1)


def who_goes_on(scheduler: Scheduler, alive: Iterable[Request]) -> list[Request]:
    """Of the requests of a step that is under way those that will have a next token for sure unless
    this one ends them; none where anybody else is to be scheduled or blocks could run out."""
    there = set(alive)
    if scheduler.waiting or len(there) < len(scheduler.running):
        return []
    going = [request for request in there if len(request.tokens) + 1 < request.max_length]
    # At most a new block each, and one in place of a block that others read: nobody has to give
    # way whose tokens are not known.
    return going if 2 * len(going) <= scheduler.pool.free else []


def after(flight: Flight, batch: Batch) -> Batch:
    """The batch with the tokens that the flight chooses in place of those that are unknown."""
    places = {id(request): row for row, request in enumerate(flight.requests)}
    rows = [places[id(item.request)] for item in batch.sampling]
    ids = flight.chosen.gather(torch.tensor(rows, dtype=torch.int64))
    return replace(batch, inputs=replace(batch.inputs, token_ids=ids))


def launch(
    runner: ModelRunner, step: Step, began: float, before: Flight | None = None
) -> tuple[Batch, Tensor | None, Tensor, Times]:
    """Compute a step, whose unknown tokens are those of `before`: what it was made of, hidden
    states and logits, which on a GPU are under way, and when it all was."""
    runner.move_blocks(step)
    scheduled = time.perf_counter()
    size, decoder = runner.cache.block_size, runner.decoder
    batch = build_batch(step.work, block_size=size, dtype=decoder.dtype, device=decoder.device)
    batch = batch if before is None else after(before, batch)
    built = time.perf_counter()
    hidden, logits = runner.compute(batch.inputs, batch.rows, bool(batch.reading))
    return batch, hidden, logits, (began, scheduled, built, time.perf_counter())


def flying(runner: ModelRunner, step: Step, batch: Batch, logits: Tensor, times: Times) -> Flight:
    """The launched step with its tokens, which are launched too."""
    draws = [draw_for(item.request) for item in batch.sampling]
    return Flight(step, batch, runner.choose_later(logits, draws), times)


def go_on(
    runner: ModelRunner, scheduler: Scheduler, flight: Flight, alive: Iterable[Request]
) -> Flight | None:
    """Launch the step after a flight that the scheduler has advanced past; None where it has to
    wait for the flight's tokens. `alive`: those of the flight who go on, or may."""
    began, going = time.perf_counter(), who_goes_on(scheduler, alive)
    if not going:
        return None
    for request in going:
        request.tokens.append(UNKNOWN)
    step = scheduler.schedule()
    batch, _, logits, times = launch(runner, step, began, flight)
    found = flying(runner, step, batch, logits, times)
    for request in going:
        request.tokens.pop()
    return found
