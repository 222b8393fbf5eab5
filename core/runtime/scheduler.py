"""Which tokens of which requests to compute next."""

import itertools
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from infopt.core.recipe.serve import Batching, EngineSettings
from infopt.core.runtime.block_pool import NO_BLOCK, BlockPool
from infopt.core.runtime.prefix_cache import PrefixCache
from infopt.core.runtime.request import Joined, Request


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `tokens` of the request's known tokens; their blocks are at hand."""

    request: Request
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether this reaches the last known token, so that the next one can be chosen."""
        request = self.request
        return self.tokens == request.pending and request.params.pooling is None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next: first the blocks, in the order of these fields, then the work."""

    work: list[Work]
    spills: list[tuple[int, bytes]] = field(default_factory=list)
    """Blocks about to be overwritten, and the names of what they hold until then."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target): blocks that are written into, and were shared; no target is a source."""
    restores: list[tuple[Tensor, int]] = field(default_factory=list)
    """What a lower tier held, into this block. Fetched already: a file can be lost at any time, and
    what it held is then work."""
    joined: list[Joined] = field(default_factory=list)
    """Who waits no longer, for the first time."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How the scheduler decides."""

    max_batch_tokens: int
    """Tokens of one step."""
    max_running: int
    """Requests of one step."""
    max_chunk_tokens: int | None = None
    """Of these, tokens of one prompt at most."""
    watermark: int = 0
    """Blocks that stay free when a request is let in beside others."""
    batching: Batching = "continuous"
    batch_wait_s: float = 0.0
    """How long a dynamic batch waits to be full."""
    window: int | None = None
    """No layer looks back on more tokens than these; None where one looks back on all."""

    @classmethod
    def of(cls, settings: EngineSettings, blocks: int, window: int | None) -> "Rules":
        """As an engine's settings have them, of a cache of so many blocks."""
        return cls(
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
            max_chunk_tokens=settings.max_chunk_tokens,
            watermark=int(settings.watermark * blocks),
            batching=settings.batching,
            batch_wait_s=settings.batch_wait_s,
            window=window,
        )


def _order(request: Request) -> tuple[int, int, int]:
    return request.order


class Scheduler:
    """Each step lets every request's computed tokens catch up with its known ones, in a budget.

    There is no prefill and no decode phase: a long prompt is caught up with in chunks, a preempted
    request from the start again, a running one by a token a step, and those come first: no prompt
    makes a stream wait longer than for one step. Lower numbers of priority come first, and among
    equals who came first. A request is let in when the blocks for all its known tokens are free;
    when blocks run out, the last in order gives its own back and waits.
    """

    def __init__(
        self,
        pool: BlockPool,
        rules: Rules,
        *,
        block_size: int,
        prefix: PrefixCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.rules = rules
        self.block_size = block_size
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        """Both in order: the last is the first to give way."""
        self.preemptions = 0
        self.prefix_queries = 0
        """Tokens of the requests let in for the first time, and those of them that were known."""
        self.prefix_hits = 0
        self._prefix = prefix
        self._clock = clock
        self._arrivals = itertools.count()
        self._budget = 0
        self._planned: dict[Request, int] = {}
        self._copies: dict[int, int] = {}
        self._restores: dict[int, Tensor] = {}
        self._joined: list[Joined] = []

    def add(self, request: Request) -> None:
        """Queue a request; the caller has seen that the whole pool can hold it at its longest."""
        request.order = (request.params.priority, next(self._arrivals), request.index)
        request.arrived = self._clock()
        insort(self.waiting, request, key=_order)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and free its blocks."""
        for place in (self.running, self.waiting):
            index = bisect_left(place, request.order, key=_order)
            if place[index : index + 1] == [request]:
                del place[index]
        self._free(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Queue a request that has all that the parent has computed, by sharing its blocks.

        Where the parent holds none, or no more may run, the child waits and computes it anew.
        """
        child.order = (*parent.order[:2], child.index)
        child.arrived, child.joined = parent.arrived, parent.joined
        child.digests = parent.digests[: parent.computed // self.block_size]
        if parent not in self.running or len(self.running) >= self.rules.max_running:
            insort(self.waiting, child, key=_order)
            return
        child.computed, child.published = parent.computed, parent.published
        child.blocks = parent.blocks[: self._blocks_for(parent.computed)]
        for block in child.blocks:
            if block != NO_BLOCK:
                self.pool.share(block)
        insort(self.running, child, key=_order)

    def resume(self, request: Request) -> None:
        """It has got a token: queue it again if it lost its place while it was waiting for one."""
        if request not in self.running and request not in self.waiting:
            insort(self.waiting, request, key=_order)

    def schedule(self) -> Step:
        """The next step; without work only if there are no requests, or while a batch gathers."""
        self._budget = self.rules.max_batch_tokens
        self._planned, self._copies, self._restores, self._joined = {}, {}, {}, []
        before = self.preemptions
        self._catch_up(chunks=False)
        self._catch_up(chunks=True)
        if self.preemptions == before:
            self._admit()
        while not self._planned and self.running and any(r.joined for r in self.waiting):
            # All that run are beams that wait for others, and those for their places.
            self._preempt(self.running[-1])
            self._admit()
        spills, self.pool.evicted = self.pool.evicted, []
        return Step(
            [Work(request, tokens) for request, tokens in self._planned.items()],
            spills,
            [(source, target) for target, source in self._copies.items()],
            [(content, target) for target, content in self._restores.items()],
            self._joined,
        )

    def advance(self, step: Step) -> None:
        """The step is done: its tokens are in the cache."""
        for item in step.work:
            item.request.computed += item.tokens
            if self._prefix is not None:
                self._prefix.publish(item.request)
            if self.rules.window is not None:
                self._release_behind(item.request, self.rules.window)

    def gathers_for(self) -> float:
        """Seconds until the batch that gathers is due; 0 where none does."""
        if self.running or not self.waiting or self.rules.batching != "dynamic":
            return 0.0
        if len(self.waiting) >= self.rules.max_running or any(r.joined for r in self.waiting):
            return 0.0
        oldest = min(request.arrived for request in self.waiting)
        return max(0.0, oldest + self.rules.batch_wait_s - self._clock())

    def _catch_up(self, *, chunks: bool) -> None:
        """Plan the running requests that are behind by one token, or those by more."""
        index = 0
        # Who gives way is the last one, so that the indices of those before stand.
        while index < len(self.running) and self._budget:
            request = self.running[index]
            if request.pending and (request.pending > 1) is chunks:
                self._plan(request)
            index += 1

    def _plan(self, request: Request) -> None:
        chunk = self.rules.max_chunk_tokens or self._budget
        tokens = min(request.pending, self._budget, chunk)
        if tokens and self._make_room(request, request.computed + tokens):
            self._planned[request] = tokens
            self._budget -= tokens

    def _admit(self) -> None:
        continuous = self.rules.batching == "continuous"
        # A batch all of which gave way is still under way.
        begun = bool(self.running) or any(request.joined for request in self.waiting)
        forming = continuous or not (begun or self.gathers_for())
        while request := next((r for r in self.waiting if forming or r.joined), None):
            # A static batch is formed at once, even where its first step does not reach all.
            if not self._budget and (continuous or not forming):
                return
            if not self._fits(request) and not (continuous and self._yield_to(request)):
                return
            if self._let_in(request):
                self._plan(request)

    def _fits(self, request: Request) -> bool:
        """Whether there is a seat, and blocks for all known tokens and the watermark."""
        if len(self.running) >= self.rules.max_running:
            return False
        spare = self.rules.watermark if self.running else 0
        return self._wanted(request) + spare <= self.pool.free

    def _wanted(self, request: Request) -> int:
        """Free blocks that letting it in would use, those found by their names among them."""
        known = self._prefix.match(request) if self._prefix is not None else []
        owned = sum(block is not None and self.pool.owners(block) > 0 for block in known)
        return self._blocks_for(len(request.tokens)) - owned

    def _yield_to(self, request: Request) -> bool:
        """Preempt what is of lower priority until the request fits, if that can be enough."""
        below = [other for other in self.running if other.order[0] > request.order[0]]
        held = sum(len(other.blocks) for other in below)
        if not below or self._wanted(request) > self.pool.free + held:
            return False
        while not self._fits(request):
            if self.running[-1].order[0] <= request.order[0]:
                return False
            self._preempt(self.running[-1])
        return True

    def _let_in(self, request: Request) -> bool:
        """Give it blocks for all its known tokens, those that others computed first.

        False where a lower tier has lost what it was said to hold: nothing is done, and whether the
        request fits is to be judged again.
        """
        known = self._prefix.match(request) if self._prefix is not None else []
        below = [index for index, block in enumerate(known) if block is None]
        contents: list[Tensor] | None = []
        if self._prefix is not None:
            contents = self._prefix.fetch([request.digests[index] for index in below])
        if contents is None:
            return False
        fetched = dict(zip(below, contents, strict=True))
        for block in known:
            if block is not None:  # owned before any is taken, lest it be taken for the others
                self.pool.share(block)
        for index, block in enumerate(known):
            if block is None:
                block = self._take(1)[0]
                self._restores[block] = fetched[index]
            request.blocks.append(block)
        request.computed = len(known) * self.block_size
        if not request.joined:
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.computed
            waited = self._clock() - request.arrived
            self._joined.append(Joined(request.request_id, waited, request.computed))
        request.joined = True
        self._grow(request, len(request.tokens))
        self.waiting.remove(request)
        insort(self.running, request, key=_order)
        return True

    def _make_room(self, request: Request, length: int) -> bool:
        """Get blocks for `length` tokens, preempting the last; False if that is the request."""
        while self._missing(request, length) + self._shares_tail(request) > self.pool.free:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        self._grow(request, length)
        return True

    def _preempt(self, request: Request) -> None:
        del self.running[bisect_left(self.running, request.order, key=_order)]
        self._budget += self._planned.pop(request, 0)
        if request.pending:  # else there is nothing to compute until it is resumed
            insort(self.waiting, request, key=_order)
        self._free(request)
        self.preemptions += 1

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _missing(self, request: Request, length: int) -> int:
        return max(0, self._blocks_for(length) - len(request.blocks))

    def _shares_tail(self, request: Request) -> bool:
        """Whether the block that it writes next is one that others read."""
        index = request.computed // self.block_size
        return index < len(request.blocks) and self.pool.owners(request.blocks[index]) > 1

    def _grow(self, request: Request, length: int) -> None:
        if self._shares_tail(request):
            index = request.computed // self.block_size
            (own,) = self._take(1)
            self._copies[own] = request.blocks[index]
            self.pool.release([request.blocks[index]])
            request.blocks[index] = own
        request.blocks += self._take(self._missing(request, length))

    def _take(self, count: int) -> list[int]:
        blocks = self.pool.take(count)
        for block in blocks:  # what was to be moved into it belonged to one who gave way since
            self._copies.pop(block, None)
            self._restores.pop(block, None)
        return blocks

    def _release_behind(self, request: Request, window: int) -> None:
        """Give back the blocks that lie wholly before what the next token looks back on."""
        behind = max(0, request.computed - window + 1) // self.block_size
        # From the last one on: before those, all have been given back.
        for index in range(behind - 1, -1, -1):
            if request.blocks[index] == NO_BLOCK:
                break
            self.pool.release([request.blocks[index]])
            request.blocks[index] = NO_BLOCK

    def _free(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.computed, request.published = [], 0, 0
