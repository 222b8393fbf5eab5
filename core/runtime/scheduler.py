"""Which tokens of which requests to compute next."""

from collections import deque
from dataclasses import dataclass

from infopt.core.runtime.block_pool import BlockPool
from infopt.core.runtime.request import Request


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `tokens` of the request's known tokens; their blocks are at hand."""

    request: Request
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether this reaches the last known token, so that the next one can be chosen."""
        return self.tokens == self.request.pending


class Scheduler:
    """First come, first served: each step lets every request's computed tokens catch up with its
    known ones, within a budget.

    There is no prefill and no decode phase: a long prompt is caught up with in chunks, a preempted
    request from the start again, a running one by a token a step. A request is let in when the
    blocks for all its known tokens are free; when blocks run out, the newest gives its own back and
    waits.
    """

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_batch_tokens: int, max_running: int
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order of arrival, which preemption keeps: the newest is the last."""
        self.preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request; the caller has seen that the whole pool can hold it at its longest."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._free(request)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty only when there are no requests."""
        budget = self.max_batch_tokens
        before = self.preemptions
        work: list[Work] = []
        index = 0
        while index < len(self.running) and budget:
            request = self.running[index]
            tokens = min(request.pending, budget)
            if self._make_room(request, request.computed + tokens):
                work.append(Work(request, tokens))
                budget -= tokens
            index += 1
        if self.preemptions == before:
            work += self._admit(budget)
        return work

    def advance(self, work: list[Work]) -> None:
        """The step is done: its tokens are in the cache."""
        for item in work:
            item.request.computed += item.tokens

    def _admit(self, budget: int) -> list[Work]:
        work: list[Work] = []
        while self.waiting and budget and len(self.running) < self.max_running:
            request = self.waiting[0]
            if self._missing(request, len(request.tokens)) > self.pool.free:
                break
            self._grow(request, len(request.tokens))
            self.running.append(self.waiting.popleft())
            tokens = min(request.pending, budget)
            work.append(Work(request, tokens))
            budget -= tokens
        return work

    def _make_room(self, request: Request, length: int) -> bool:
        """Get blocks for `length` tokens, preempting the newest; False if that is the request."""
        while self._missing(request, length) > self.pool.free:
            newest = self.running.pop()
            self._preempt(newest)
            if newest is request:
                return False
        self._grow(request, length)
        return True

    def _preempt(self, request: Request) -> None:
        self._free(request)
        request.computed = 0
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _missing(self, request: Request, length: int) -> int:
        return -(-length // self.block_size) - len(request.blocks)

    def _grow(self, request: Request, length: int) -> None:
        request.blocks += self.pool.take(max(0, self._missing(request, length)))

    def _free(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
