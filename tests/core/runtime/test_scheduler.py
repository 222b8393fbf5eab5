"""The scheduler without a model, decision by decision."""

import torch

from infopt.core.runtime.block_pool import NO_BLOCK, BlockPool
from infopt.core.runtime.prefix_cache import PrefixCache
from infopt.core.runtime.request import Request, SamplingParams
from infopt.core.runtime.scheduler import Rules, Scheduler, Step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(
    blocks: int = 8,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_running: int = 4,
    *,
    caching: bool = False,
    clock: Clock | None = None,
    **rules: object,
) -> Scheduler:
    pool = BlockPool(blocks)
    return Scheduler(
        pool,
        Rules(max_batch_tokens, max_running, **rules),  # type: ignore[arg-type]
        block_size=block_size,
        prefix=PrefixCache(pool, block_size) if caching else None,
        clock=clock or Clock(),
    )


def make_request(
    name: str, prompt: int | list[int], longest: int = 100, priority: int = 0
) -> Request:
    tokens = [0] * prompt if isinstance(prompt, int) else list(prompt)
    return Request(name, SamplingParams(priority=priority), tokens, longest, torch.Generator())


def run_step(scheduler: Scheduler) -> dict[str, int]:
    """Schedule, compute, and give each request that caught up its next token."""
    return shares(compute(scheduler))


def compute(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    caught_up = [item.request for item in step.work if item.samples]
    scheduler.advance(step)
    for request in caught_up:
        request.tokens.append(0)
    return step


def shares(step: Step) -> dict[str, int]:
    return {item.request.request_id: item.tokens for item in step.work}


def names(requests: list[Request]) -> list[str]:
    return [request.request_id for request in requests]


def test_a_long_prompt_is_caught_up_with_in_chunks() -> None:
    scheduler = make_scheduler(blocks=16)
    scheduler.add(make_request("long", 40))
    assert [run_step(scheduler) for _ in range(4)] == [
        {"long": 16}, {"long": 16}, {"long": 8}, {"long": 1}
    ]  # fmt: skip


def test_running_requests_go_on_while_a_prompt_comes_in() -> None:
    scheduler = make_scheduler(blocks=16)
    scheduler.add(make_request("a", 3))
    run_step(scheduler)
    scheduler.add(make_request("b", 20))
    assert run_step(scheduler) == {"a": 1, "b": 15}
    assert run_step(scheduler) == {"a": 1, "b": 5}
    assert run_step(scheduler) == {"a": 1, "b": 1}


def test_streams_come_before_prompts_even_those_of_earlier_requests() -> None:
    scheduler = make_scheduler(blocks=32, max_batch_tokens=8, max_chunk_tokens=6)
    scheduler.add(make_request("long", 60))
    scheduler.add(make_request("short", 2))
    assert run_step(scheduler) == {"long": 6, "short": 2}
    for _ in range(3):
        assert run_step(scheduler) == {"short": 1, "long": 6}


def test_a_cap_on_chunks_lets_other_prompts_in_beside_a_long_one() -> None:
    scheduler = make_scheduler(blocks=32, max_chunk_tokens=4)
    scheduler.add(make_request("long", 60))
    scheduler.add(make_request("other", 9))
    assert run_step(scheduler) == {"long": 4, "other": 4}
    scheduler = make_scheduler(blocks=32)
    scheduler.add(make_request("long", 60))
    scheduler.add(make_request("other", 9))
    assert run_step(scheduler) == {"long": 16}


def test_a_request_waits_until_its_whole_prompt_has_blocks() -> None:
    scheduler = make_scheduler(blocks=5)
    scheduler.add(make_request("a", 12))
    scheduler.add(make_request("b", 12))
    assert run_step(scheduler) == {"a": 12}
    scheduler.remove(scheduler.running[0])
    assert run_step(scheduler) == {"b": 12}


def test_a_watermark_is_left_free_beside_others_only() -> None:
    scheduler = make_scheduler(blocks=4, watermark=1)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 8))
    assert run_step(scheduler) == {"a": 8}
    scheduler = make_scheduler(blocks=4, watermark=1)
    scheduler.add(make_request("alone", 16))
    assert run_step(scheduler) == {"alone": 16}


def test_no_more_run_than_allowed() -> None:
    scheduler = make_scheduler(max_running=2)
    for name in "abc":
        scheduler.add(make_request(name, 2))
    assert run_step(scheduler) == {"a": 2, "b": 2}


def test_the_newest_gives_way_and_comes_back_first() -> None:
    scheduler = make_scheduler(blocks=4)
    for name in "abc":
        scheduler.add(make_request(name, 4))
    assert run_step(scheduler) == {"a": 4, "b": 4, "c": 4}
    # Each wants a second block; one is left. b takes c's, and c waits before all who come later.
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert scheduler.preemptions == 1
    scheduler.add(make_request("d", 1))
    c = scheduler.waiting[0]
    assert (c.request_id, c.computed, c.blocks, len(c.tokens)) == ("c", 0, [], 5)
    scheduler.remove(scheduler.running[0])
    assert run_step(scheduler) == {"b": 1, "c": 5}
    scheduler.pool.check()


def test_lower_numbers_come_first_and_equals_in_order_of_arrival() -> None:
    scheduler = make_scheduler(max_running=3)
    for name, priority in (("a", 1), ("b", 2), ("c", 0), ("d", 1)):
        scheduler.add(make_request(name, 1, priority=priority))
    assert list(run_step(scheduler)) == ["c", "a", "d"]


def test_the_lowest_priority_gives_way_though_it_came_first() -> None:
    scheduler = make_scheduler(blocks=4)
    scheduler.add(make_request("low", 4, priority=5))
    for name in "bc":
        scheduler.add(make_request(name, 4))
    run_step(scheduler)
    assert run_step(scheduler) == {"b": 1, "c": 1}
    assert names(scheduler.waiting) == ["low"]


def test_who_has_work_already_and_gives_way_loses_it() -> None:
    """The stream's token was planned first; the prompt's fork wants the stream's block."""
    scheduler = make_scheduler(blocks=3, max_batch_tokens=8)
    parent = make_request("p", [1, 2, 3, 4, 5, 6], priority=0)
    scheduler.add(parent)
    scheduler.add(make_request("stream", 2, priority=1))
    assert run_step(scheduler) == {"p": 6, "stream": 2}
    child = make_request("child", [*parent.tokens, 9], priority=0)
    child.index = 1
    scheduler.fork(parent, child)  # shares a tail, and is two tokens behind: a chunk
    parent.tokens.append(9)
    assert run_step(scheduler) == {"p": 2, "child": 2}
    assert names(scheduler.waiting) == ["stream"]


def test_a_request_of_higher_priority_takes_the_place_of_a_lower_one() -> None:
    scheduler = make_scheduler(blocks=6, max_running=2)
    scheduler.add(make_request("low", 6, priority=3))
    scheduler.add(make_request("mid", 6, priority=2))
    run_step(scheduler)
    scheduler.add(make_request("high", 8, priority=1))
    assert run_step(scheduler) == {"mid": 1, "high": 8}, "low's token was planned already"
    assert names(scheduler.running) == ["high", "mid"] and names(scheduler.waiting) == ["low"]
    scheduler.pool.check([r.blocks for r in scheduler.running])


def test_nobody_gives_way_to_an_equal_or_in_vain() -> None:
    scheduler = make_scheduler(blocks=4)
    scheduler.add(make_request("first", 10, priority=1))
    scheduler.add(make_request("low", 2, priority=2))
    run_step(scheduler)
    scheduler.add(make_request("equal", 8, priority=1))
    run_step(scheduler)
    assert scheduler.preemptions == 0 and names(scheduler.waiting) == ["equal"]


def test_static_batches_wait_for_the_one_before() -> None:
    scheduler = make_scheduler(max_batch_tokens=4, max_running=2, batching="static")
    a, b = make_request("a", 3), make_request("b", 3)
    for request in (a, b, make_request("c", 3)):
        scheduler.add(request)
    assert run_step(scheduler) == {"a": 3, "b": 1}, "a batch is formed at once, whatever fits"
    assert run_step(scheduler) == {"a": 1, "b": 2}
    scheduler.remove(a)
    assert run_step(scheduler) == {"b": 1}, "its seat stays empty until the whole batch has ended"
    scheduler.remove(b)
    assert run_step(scheduler) == {"c": 3}


def test_who_gave_way_comes_back_into_its_static_batch() -> None:
    scheduler = make_scheduler(blocks=3, batching="static")
    a, b = make_request("a", 4), make_request("b", 4)
    scheduler.add(a)
    scheduler.add(b)
    run_step(scheduler)
    scheduler.add(make_request("c", 1))
    assert run_step(scheduler) == {"a": 1} and names(scheduler.waiting) == ["b", "c"]
    scheduler.remove(a)
    assert "b" in run_step(scheduler)


def test_dynamic_batches_go_when_they_are_full_or_have_waited() -> None:
    clock = Clock()
    scheduler = make_scheduler(max_running=2, batching="dynamic", batch_wait_s=0.5, clock=clock)
    scheduler.add(make_request("a", 3))
    assert run_step(scheduler) == {} and scheduler.gathers_for() == 0.5
    clock.now = 0.4
    assert run_step(scheduler) == {} and 0.05 < scheduler.gathers_for() < 0.15
    clock.now = 0.5
    assert run_step(scheduler) == {"a": 3}
    scheduler.add(make_request("b", 3))
    scheduler.add(make_request("c", 3))
    assert run_step(scheduler) == {"a": 1}
    scheduler.remove(scheduler.running[0])
    assert scheduler.gathers_for() == 0.0
    assert run_step(scheduler) == {"b": 3, "c": 3}, "two are all that may run"


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler(caching=True)
    a = make_request("a", [*range(10)])
    scheduler.add(a)
    run_step(scheduler)
    scheduler.add(make_request("b", [*range(9), 50, 51]))
    assert run_step(scheduler) == {"a": 1, "b": 3}
    b = scheduler.running[1]
    assert b.blocks[:2] == a.blocks[:2] and b.blocks[2] != a.blocks[2]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (21, 8)
    scheduler.pool.check([a.blocks, b.blocks])


def test_blocks_found_are_not_counted_as_wanted() -> None:
    """All but one of the pool's blocks are shared with a request that runs."""
    scheduler = make_scheduler(blocks=4, caching=True)
    scheduler.add(make_request("a", [*range(12)]))
    run_step(scheduler)
    scheduler.remove(scheduler.running[0])
    scheduler.add(make_request("b", [*range(12), 1, 2]))
    assert run_step(scheduler) == {"b": 2}
    scheduler.add(make_request("c", [*range(12), 3, 4]))
    assert run_step(scheduler) == {"b": 1}, "b's fourth block is the last"


def test_who_gave_way_finds_what_it_had_computed() -> None:
    scheduler = make_scheduler(blocks=4, caching=True)
    a, b = make_request("a", [1] * 7), make_request("b", [2] * 8)
    scheduler.add(a)
    scheduler.add(b)
    run_step(scheduler)
    assert run_step(scheduler) == {"a": 1}
    assert scheduler.preemptions == 1 and names(scheduler.waiting) == ["b"]
    scheduler.remove(a)
    assert run_step(scheduler) == {"b": 1}, "eight of its nine tokens were found"
    assert scheduler.prefix_queries == 15, "a return is no query"


class Lossy(dict[bytes, torch.Tensor]):
    """A tier that holds what it has been given until it is asked for it."""

    def get(self, digest: bytes) -> None:  # type: ignore[override]
        self.pop(digest, None)


def beside_a_lost_block(blocks: int) -> tuple[Scheduler, Request, Lossy]:
    """A request runs whose first block can only be found in a lossy tier; "again" waits with the
    same prompt."""
    scheduler = make_scheduler(blocks=blocks, caching=True)
    assert scheduler._prefix is not None
    scheduler._prefix._tier = tier = Lossy()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    scheduler.add(make_request("owner", prompt))
    run_step(scheduler)
    owner = scheduler.running[0]
    scheduler.pool.forget(owner.blocks[0])
    tier[owner.digests[0]] = torch.zeros(1)
    scheduler.add(make_request("again", prompt))
    return scheduler, owner, tier


def test_what_a_tier_has_lost_is_computed_and_found_room_for() -> None:
    """The second block is another's, so that without the first one a block more is needed."""
    scheduler, owner, tier = beside_a_lost_block(blocks=4)
    assert scheduler._wanted(scheduler.waiting[0]) == 2 > scheduler.pool.free == 1
    scheduler.remove(owner)
    assert scheduler._wanted(scheduler.waiting[0]) == 3
    step = compute(scheduler)
    assert shares(step) == {"again": 9} and step.restores == [] and not tier
    assert scheduler.prefix_hits == 0


def test_who_no_longer_fits_without_what_was_lost_waits() -> None:
    scheduler, owner, tier = beside_a_lost_block(blocks=5)
    # It would fit: one block is restored, one shared, one its own. Without the first, it has none.
    assert scheduler._fits(scheduler.waiting[0]) and scheduler.pool.free == 2
    assert run_step(scheduler) == {"owner": 1}
    assert names(scheduler.waiting) == ["again"] and not tier
    scheduler.remove(owner)
    assert run_step(scheduler) == {"again": 9}


def test_a_fork_copies_the_block_that_it_writes_into_and_no_other() -> None:
    scheduler = make_scheduler()
    parent = make_request("p", 6)
    scheduler.add(parent)
    run_step(scheduler)
    parent.tokens.pop()
    child = make_request("child", 6)
    child.index = 1
    scheduler.fork(parent, child)
    assert child.blocks == parent.blocks and child.computed == 6
    for request in (parent, child):
        request.tokens.append(0)
    before = list(parent.blocks)
    step = compute(scheduler)
    assert shares(step) == {"p": 1, "child": 1}
    assert step.copies == [(before[1], parent.blocks[1])]
    assert child.blocks == before and parent.blocks[0] == before[0]
    assert compute(scheduler).copies == []
    scheduler.pool.check([parent.blocks, child.blocks])


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    scheduler = make_scheduler()
    parent = make_request("p", 8)
    scheduler.add(parent)
    run_step(scheduler)
    child = make_request("child", 9)
    scheduler.fork(parent, child)
    assert compute(scheduler).copies == []
    assert parent.blocks[:2] == child.blocks[:2] and parent.blocks[2] != child.blocks[2]


def test_a_fork_beyond_the_seats_waits() -> None:
    scheduler = make_scheduler(max_running=1)
    parent = make_request("p", 6)
    scheduler.add(parent)
    run_step(scheduler)
    child = make_request("child", 7)
    child.index = 1
    scheduler.fork(parent, child)
    assert names(scheduler.waiting) == ["child"] and child.blocks == [] and child.computed == 0
    scheduler.remove(parent)
    assert run_step(scheduler) == {"child": 7}


def test_blocks_behind_the_window_are_given_back() -> None:
    scheduler = make_scheduler(blocks=8, window=6)
    request = make_request("w", 15, longest=30)
    scheduler.add(request)
    assert run_step(scheduler) == {"w": 15}
    # The next token is at 15 and looks back on 10 to 15: blocks 0 and 1 end at 7.
    assert request.blocks[:2] == [NO_BLOCK] * 2 and NO_BLOCK not in request.blocks[2:]
    assert scheduler.pool.used == 2
    for _ in range(10):
        run_step(scheduler)
        assert scheduler.pool.used <= 3
        scheduler.pool.check([request.blocks])
    scheduler.remove(request)
    assert scheduler.pool.used == 0
