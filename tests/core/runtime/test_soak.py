"""Many requests, many of them aborted: no request is lost, no block, no memory."""

import gc
import random
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams

REQUESTS = 2000
WARM = 500
AT_ONCE = 12
# What the engine holds for a request is 4 KB at the least: 2.5 KB are the state of its generator,
# the rest its lists and its parameters. If one in two of the requests after the warm-up left that
# behind, it would be 3 MB; if each left a block of the cache in host memory, 1.5 MB more. The
# allocator's own noise was a few hundred KB. All that may grow (pool, tiers) is full by then.
GROWTH_BYTES = 3 * 2**20


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (length,), generator=generator).tolist()


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


class Crowd:
    """Keeps an engine busy with short requests, and aborts some of them wherever they are."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.begun = self.ended = self.aborted = 0
        self._chance = random.Random(0)
        self._live: dict[str, set[int]] = {}
        self._beginnings = [prompt_of(20, seed) for seed in range(6)]

    def run(self, requests: int) -> None:
        """Until so many have begun since ever, and all are over."""
        while self.begun < requests or self.engine.has_work():
            while self.begun < requests and len(self._live) < AT_ONCE:
                self._begin()
            if self._live and self._chance.random() < 0.2:
                self._abort(self._chance.choice(sorted(self._live)))
            self._step()
            if self.engine.stats().steps % 16 == 0:
                self.engine.check()
        assert not self._live, "each was answered"

    def _begin(self) -> None:
        chance, name = self._chance, str(self.begun)
        beginning = chance.choice(self._beginnings)[: chance.randrange(21)]
        params = SamplingParams(
            max_tokens=chance.randint(1, 4),
            temperature=chance.choice((0.0, 1.0)),
            ignore_eos=True,
            n=chance.choice((1, 1, 1, 2, 4)),
            priority=chance.randrange(3),
            cache_salt=chance.choice(("", "", "tenant")),
        )
        self.engine.add(name, [*beginning, self.begun % 97], params)
        self._live[name] = set(range(params.n))
        self.begun += 1

    def _abort(self, name: str) -> None:
        """All answers, or one of them."""
        self.engine.abort(name, self._chance.choice((None, None, 0, 1)))
        self.aborted += 1

    def _step(self) -> None:
        for output in self.engine.step():
            if output.finish_reason is None:
                continue
            assert output.finish_reason in ("length", "abort")
            self._live[output.request_id].remove(output.index)
            if not self._live[output.request_id]:
                del self._live[output.request_id]
                self.ended += 1


@pytest.mark.slow
def test_a_soak_leaves_nothing_behind(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine(
        kv_blocks=24,
        max_batch_tokens=48,
        prefix_host_bytes=16 * 1024,
        prefix_disk=str(tmp_path / "kv"),
        prefix_disk_bytes=32 * 1064,
    )
    crowd = Crowd(engine)
    crowd.run(WARM)
    before = resident_bytes()
    crowd.run(REQUESTS)
    growth = resident_bytes() - before
    engine.check()
    stats = engine.stats()
    assert crowd.begun == crowd.ended == REQUESTS and crowd.aborted > 100
    assert stats.preemptions > 50 and stats.prefix_hits > 1000, "the pool is small"
    assert stats.blocks_used == stats.running == stats.waiting == 0
    assert stats.blocks_free + stats.blocks_used == stats.blocks_total
    assert stats.host_bytes <= 16 * 1024 and stats.disk_bytes <= 32 * 1064
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.1f} MB more after {REQUESTS - WARM} requests"
