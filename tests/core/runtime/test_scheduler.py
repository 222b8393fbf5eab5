"""The scheduler without a model: random adds, steps and removals on tiny pools."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infopt.core.runtime.block_pool import BlockPool
from infopt.core.runtime.request import Request, SamplingParams
from infopt.core.runtime.scheduler import Scheduler, Work


def make_scheduler(
    blocks: int = 8, block_size: int = 4, max_batch_tokens: int = 16, max_running: int = 4
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks),
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
    )


def make_request(name: str, prompt: int, longest: int = 100) -> Request:
    return Request(name, SamplingParams(), [0] * prompt, longest, torch.Generator())


def run_step(scheduler: Scheduler) -> list[Work]:
    """Schedule, compute, and give each request that caught up its next token."""
    work = scheduler.schedule()
    caught_up = [item.request for item in work if item.samples]
    scheduler.advance(work)
    for request in caught_up:
        request.tokens.append(0)
    return work


def shares(work: list[Work]) -> dict[str, int]:
    return {item.request.request_id: item.tokens for item in work}


def test_a_long_prompt_is_caught_up_with_in_chunks() -> None:
    scheduler = make_scheduler(blocks=16)
    scheduler.add(make_request("long", 40))
    assert [shares(run_step(scheduler)) for _ in range(4)] == [
        {"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}
    ]  # fmt: skip


def test_running_requests_go_on_while_a_prompt_comes_in() -> None:
    scheduler = make_scheduler(blocks=16)
    scheduler.add(make_request("a", 3))
    run_step(scheduler)
    scheduler.add(make_request("b", 20))
    assert shares(run_step(scheduler)) == {"a": 1, "b": 15}
    assert shares(run_step(scheduler)) == {"a": 1, "b": 5}
    assert shares(run_step(scheduler)) == {"a": 1, "b": 1}


def test_a_request_waits_until_its_whole_prompt_has_blocks() -> None:
    scheduler = make_scheduler(blocks=5)
    scheduler.add(make_request("a", 12))
    scheduler.add(make_request("b", 12))
    assert shares(run_step(scheduler)) == {"a": 12}
    scheduler.remove(scheduler.running[0])
    assert shares(run_step(scheduler)) == {"b": 12}


def test_no_more_run_than_allowed() -> None:
    scheduler = make_scheduler(max_running=2)
    for name in "abc":
        scheduler.add(make_request(name, 2))
    assert shares(run_step(scheduler)) == {"a": 2, "b": 2}


def test_the_newest_gives_way_and_comes_back_first() -> None:
    scheduler = make_scheduler(blocks=4)
    for name in "abc":
        scheduler.add(make_request(name, 4))
    assert shares(run_step(scheduler)) == {"a": 4, "b": 4, "c": 4}
    # Each wants a second block; one is left. b takes c's, and c waits before all who come later.
    assert shares(run_step(scheduler)) == {"a": 1, "b": 1}
    assert scheduler.preemptions == 1
    scheduler.add(make_request("d", 1))
    c = scheduler.waiting[0]
    assert (c.request_id, c.computed, c.blocks, len(c.tokens)) == ("c", 0, [], 5)
    scheduler.remove(scheduler.running[0])
    assert shares(run_step(scheduler)) == {"b": 1, "c": 5}
    scheduler.pool.check()


class Random(RuleBasedStateMachine):
    """Whatever comes, blocks add up, order is kept, and everything gets done."""

    @initialize(
        blocks=st.integers(1, 10),
        block_size=st.integers(1, 4),
        budget=st.integers(1, 12),
        max_running=st.integers(1, 5),
    )
    def start(self, blocks: int, block_size: int, budget: int, max_running: int) -> None:
        self.scheduler = make_scheduler(blocks, block_size, budget, max_running)
        self.slots = blocks * block_size
        self.live: list[Request] = []
        self.count = 0

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        prompt = data.draw(st.integers(1, self.slots))
        longest = data.draw(st.integers(prompt + 1, self.slots + 1))
        request = make_request(str(self.count), prompt, longest)
        self.count += 1
        self.live.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.live)))

    @rule()
    def step(self) -> None:
        known = {r.request_id: (len(r.tokens), r.computed) for r in self.live}
        work = run_step(self.scheduler)
        assert bool(work) == bool(self.live), "while there are requests, something is done"
        assert sum(item.tokens for item in work) <= self.scheduler.max_batch_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_running
        for item in work:
            assert item.tokens >= 1
            tokens, computed = known[item.request.request_id]
            assert item.request.computed <= tokens
            assert item.request.computed in (computed + item.tokens, item.tokens)
        for request in list(self.live):
            if len(request.tokens) == request.max_length:
                self.end(request)

    def end(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.live.remove(request)

    @invariant()
    def blocks_add_up(self) -> None:
        self.scheduler.pool.check()
        held = [block for request in self.live for block in request.blocks]
        assert len(held) == len(set(held)) == self.scheduler.pool.used
        for request in self.live:
            assert request.computed <= len(request.blocks) * self.scheduler.block_size

    @invariant()
    def first_come_first_served(self) -> None:
        running = [int(r.request_id) for r in self.scheduler.running]
        waiting = [int(r.request_id) for r in self.scheduler.waiting]
        assert running + waiting == sorted(running + waiting)
        assert not any(request.blocks for request in self.scheduler.waiting)

    def teardown(self) -> None:
        steps = 0
        while getattr(self, "live", None):
            self.step()
            steps += 1
            assert steps < 5000, "the oldest request always gets on"


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
