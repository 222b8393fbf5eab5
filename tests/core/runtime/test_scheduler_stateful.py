"""The scheduler on tiny pools under any sequence of events, its blocks filled and read as a model
would.

The memory here holds, in place of a key and value, all the tokens that those depend on. Whoever
reads a slot sees at once whether it holds what it should.
"""

import random
from collections import OrderedDict

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infopt.core.runtime.block_pool import NO_BLOCK, BlockPool
from infopt.core.runtime.prefix_cache import PrefixCache
from infopt.core.runtime.request import Request, SamplingParams
from infopt.core.runtime.scheduler import Rules, Scheduler, Step

Slot = tuple[int, ...] | None
"""The tokens up to this one; None where nothing was written."""


class Store(OrderedDict[bytes, list[Slot]]):
    """A lower tier, of a few blocks, some of which turn out to be lost when they are wanted."""

    lost: frozenset[bytes] = frozenset()

    def get(self, digest: bytes) -> list[Slot] | None:  # type: ignore[override]
        if digest in self.lost:
            self.pop(digest, None)
        return super().get(digest)

    def keep(self, digest: bytes, content: list[Slot]) -> None:
        self[digest] = content
        while len(self) > 3:
            self.popitem(last=False)


class Memory:
    """What a step does to the blocks, and what attention would read of them."""

    def __init__(self, blocks: int, block_size: int, window: int | None, store: Store) -> None:
        self.size, self.window, self.store = block_size, window, store
        self.blocks: list[list[Slot]] = [[None] * block_size for _ in range(blocks)]

    def run(self, step: Step) -> None:
        for block, digest in step.spills:
            if digest not in self.store:
                self.store.keep(digest, list(self.blocks[block]))
        targets = {target for _, target in step.copies}
        assert len(targets) == len(step.copies)
        assert targets.isdisjoint(source for source, _ in step.copies)
        for source, target in step.copies:
            self.blocks[target] = list(self.blocks[source])
        for content, block in step.restores:
            self.blocks[block] = list(content)
        for item in step.work:  # keys and values are written before any of them is read
            for position in self.span(item.request, item.tokens):
                block = item.request.blocks[position // self.size]
                self.blocks[block][position % self.size] = self.meant(item.request, position)
        for item in step.work:
            for position in self.span(item.request, item.tokens):
                self.read(item.request, position)

    def span(self, request: Request, tokens: int) -> range:
        return range(request.computed, request.computed + tokens)

    def meant(self, request: Request, position: int) -> Slot:
        return tuple(request.tokens[: position + 1])

    def read(self, request: Request, query: int) -> None:
        first = 0 if self.window is None else max(0, query - self.window + 1)
        for position in range(first, query + 1):
            block = request.blocks[position // self.size]
            assert block != NO_BLOCK
            assert self.blocks[block][position % self.size] == self.meant(request, position)


class Random(RuleBasedStateMachine):
    """Whatever comes, blocks add up, hold what they should, and everything gets done."""

    @initialize(
        blocks=st.integers(1, 10),
        block_size=st.integers(1, 4),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
        chunk=st.none() | st.integers(1, 6),
        watermark=st.integers(0, 2),
        batching=st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
        window=st.none() | st.none() | st.integers(1, 8),
        caching=st.sampled_from([True, True, False]),
        tier=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    def start(
        self,
        blocks: int,
        block_size: int,
        budget: int,
        max_running: int,
        chunk: int | None,
        watermark: int,
        batching: str,
        window: int | None,
        caching: bool,
        tier: bool,
        seed: int,
    ) -> None:
        self.now, self.random, self.holds = 0.0, random.Random(seed), True
        self.store = Store()
        self.memory = Memory(blocks, block_size, window, self.store)
        pool = BlockPool(blocks)
        cache = PrefixCache(pool, block_size, self.store if tier else None)
        rules = Rules(budget, max_running, chunk, watermark, batching, 2.0, window)  # type: ignore[arg-type]
        self.scheduler = Scheduler(
            pool,
            rules,
            block_size=block_size,
            prefix=cache if caching else None,
            clock=lambda: self.now,
        )
        self.slots, self.live, self.count = blocks * block_size, [], 0
        self.tables: dict[Request, list[int]] = {}
        self.moved: set[Request] = set()
        preempt = self.scheduler._preempt

        def noted(request: Request) -> None:
            self.moved.add(request)  # it may be back within the same step
            preempt(request)

        self.scheduler._preempt = noted  # type: ignore[method-assign]
        self.held: set[Request] = set()
        """Beams that are computed and wait for others before they get their next tokens."""

    def request(self, tokens: list[int], longest: int, priority: int, salt: str) -> Request:
        self.count += 1
        params = SamplingParams(priority=priority, cache_salt=salt)
        made = Request(str(self.count), params, tokens, longest, torch.Generator())
        self.live.append(made)
        return made

    @rule(
        data=st.data(),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from(["", "", "tenant"]),
        beginning=st.integers(0, 2),
    )
    def add(self, data: st.DataObject, priority: int, salt: str, beginning: int) -> None:
        """Prompts are a beginning that many have, then something of their own, or nothing."""
        length = data.draw(st.integers(1, self.slots))
        own = data.draw(st.integers(0, length))
        shared = [(beginning + n) % 3 for n in range(length - own)]
        tokens = shared + [self.random.randrange(3) for _ in range(own)]
        longest = data.draw(st.integers(length + 1, self.slots + 1))
        self.scheduler.add(self.request(tokens, longest, priority, salt))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: self.live and len(self.live) < 8)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(self.live))
        child = self.request(
            list(parent.tokens),
            parent.max_length,
            parent.params.priority,
            parent.params.cache_salt,
        )
        child.index = self.count
        if parent in self.scheduler.running and parent.pending == 1:
            # Answers to one prompt part at the token that was just chosen.
            child.tokens[-1] = (child.tokens[-1] + 1) % 3
        self.scheduler.fork(parent, child)
        if parent in self.held:
            self.held.add(child)
            self.get_on(child)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        self.get_on(data.draw(st.sampled_from(sorted(self.held, key=lambda r: r.order))))

    def get_on(self, request: Request) -> None:
        self.held.remove(request)
        self.choose(request)
        if request in self.live:
            self.scheduler.resume(request)

    def choose(self, request: Request) -> None:
        request.tokens.append(self.random.randrange(3))
        if len(request.tokens) >= request.max_length:
            self.end(request)

    @precondition(lambda self: self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.scheduler._preempt(self.scheduler.running[-1])

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        pool = self.scheduler.pool
        pool.release(pool.take(data.draw(st.integers(0, pool.free))))

    @precondition(lambda self: self.store)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Nobody knows until it is wanted."""
        self.store.lost = frozenset(data.draw(st.sets(st.sampled_from(sorted(self.store)))))

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def step(self) -> None:
        scheduler, rules = self.scheduler, self.scheduler.rules
        batch = set(scheduler.running)
        strangers = {request for request in self.live if not request.joined}
        step = scheduler.schedule()
        wanting = any(request not in self.held for request in self.live)
        # Where all that run are held, one of those that they wait for is to come back.
        stuck = bool(scheduler.running) and self.held.issuperset(scheduler.running)
        stuck = stuck and not any(request.joined for request in scheduler.waiting)
        done = wanting and not scheduler.gathers_for() and not stuck
        assert bool(step.work) == done, "something is done"
        assert sum(item.tokens for item in step.work) <= rules.max_batch_tokens
        assert len(scheduler.running) <= rules.max_running
        for item in step.work:
            assert 1 <= item.tokens <= (rules.max_chunk_tokens or item.tokens)
            self.own_what_they_write(item.request, item.tokens)
            if rules.batching != "continuous" and not batch.isdisjoint(scheduler.running):
                assert item.request not in strangers, "a batch is closed once it runs"
        self.memory.run(step)
        caught_up = [item.request for item in step.work if item.samples]
        scheduler.advance(step)
        for request in caught_up:
            if self.holds and self.random.random() < 0.2:
                self.held.add(request)
            else:
                self.choose(request)
        self.now += 0.1

    def own_what_they_write(self, request: Request, tokens: int) -> None:
        pool = self.scheduler.pool
        for position in self.memory.span(request, tokens):
            block = request.blocks[position // self.memory.size]
            assert pool.owners(block) == 1 and pool.name_of(block) is None

    def end(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.live.remove(request)
        self.held.discard(request)

    @invariant()
    def blocks_add_up(self) -> None:
        self.scheduler.pool.check(request.blocks for request in self.live)
        for request in self.live:
            assert request.computed < len(request.tokens) or request in self.held
            assert request.computed <= len(request.blocks) * self.memory.size
            places = (self.scheduler.running, self.scheduler.waiting)
            found = sum(request in place for place in places)
            assert found == 1 or (found == 0 and request in self.held and not request.blocks)

    @invariant()
    def tables_only_grow(self) -> None:
        """But for the block that is written next, which may be copied, and those given back."""
        for request, before in self.tables.items():
            if request in self.scheduler.running and request.blocks:
                written = self.last_computed.get(request, 0) // self.memory.size
                for index, block in enumerate(before[: len(request.blocks)]):
                    kept = request.blocks[index] in (block, NO_BLOCK)
                    restarted = request.computed < self.last_computed.get(request, 0)
                    assert kept or index == written or restarted or request in self.moved
        self.moved = {r for r in self.live if r not in self.scheduler.running}
        self.tables = {r: list(r.blocks) for r in self.live}
        self.last_computed = {r: r.computed for r in self.live}

    @invariant()
    def what_is_named_holds_what_its_name_says(self) -> None:
        """Every block that can be found is what its finder would compute."""
        for request in self.live:
            for index in range(request.published):
                if request.blocks[index] != NO_BLOCK:
                    last = (index + 1) * self.memory.size - 1
                    found = self.scheduler.pool.find(request.digests[index])
                    if found is not None:  # the first of two that computed it may be gone
                        assert self.memory.blocks[found][-1] == self.memory.meant(request, last)

    @invariant()
    def in_order(self) -> None:
        for place in (self.scheduler.running, self.scheduler.waiting):
            orders = [request.order for request in place]
            assert orders == sorted(orders)
        assert not any(request.blocks for request in self.scheduler.waiting)

    def teardown(self) -> None:
        steps = 0
        while getattr(self, "live", None):
            self.holds = False
            for request in sorted(self.held, key=lambda r: r.order):
                self.get_on(request)
            self.step()
            steps += 1
            assert steps < 5000, "the first in order always gets on"
        if hasattr(self, "scheduler"):
            assert self.scheduler.pool.used == 0


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
