"""Steps launched before the tokens of the one before are read: the answers are the same."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams, StepOutput
from infopt.core.runtime.sampler import Choice, Chosen, Draw

MakeEngine = Callable[..., Engine]
PROMPTS = [[(7 * n + 11 * p) % 97 for n in range(3 + 5 * p)] for p in range(4)]
Found = dict[tuple[str, int], list[Any]]


class Device:
    """In place of a GPU's stream: tokens that nobody may look at before they are read, and the
    order in which steps were launched and read."""

    def __init__(self, engine: Engine) -> None:
        self.log: list[tuple[str, int]] = []
        self._runner = engine._runner
        self._choose_later = engine._runner.choose_later
        self._runner.ahead = True
        self._runner.choose_later = self.choose_later  # type: ignore[method-assign]

    def choose_later(self, logits: Tensor, draws: Sequence[Draw]) -> Chosen:
        number = sum(kind == "launched" for kind, _ in self.log)
        self.log.append(("launched", number))
        found = self._choose_later(logits, draws)

        def read() -> list[Choice]:
            self.log.append(("read", number))
            return found.read()

        return Chosen(found.tokens, read)


def told(found: Found, outputs: Sequence[StepOutput]) -> None:
    for one in outputs:
        kept = found.setdefault((one.request_id, one.index), [])
        kept.extend(one.token_ids)
        if one.logprobs is not None:
            kept.extend(tuple(round(each.logprob, 6) for each in one.logprobs))
        if one.finish_reason is not None:
            kept.append((one.finish_reason, one.error))


def run(engine: Engine, asked: Sequence[tuple[list[int], SamplingParams]]) -> Found:
    for number, (prompt, params) in enumerate(asked):
        engine.add(str(number), prompt, params)
    found: Found = {}
    while engine.has_work():
        told(found, engine.step())
        engine.check()
    stats = engine.stats()
    assert stats.blocks_used == 0 and stats.running == stats.waiting == 0
    return found


def sampled(seed: int, **more: Any) -> SamplingParams:
    values = {"temperature": 0.9, "top_p": 0.95, "seed": seed, "max_tokens": 12, **more}
    return SamplingParams(**{"ignore_eos": True, **values})


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_the_next_step_is_launched_before_tokens_are_read(make_engine: MakeEngine) -> None:
    engine = make_engine()
    device = Device(engine)
    engine.add("0", PROMPTS[1], GREEDY)
    outputs = [engine.step() for _ in range(12)]
    assert [len(one[0].token_ids) for one in outputs] == [1] * 12
    assert outputs[-1][0].finish_reason == "length" and not engine.has_work()
    # Each is launched before the one before is read; the last is known to be the last.
    launches = [device.log.index(("launched", n)) for n in range(12)]
    reads = [device.log.index(("read", n)) for n in range(12)]
    assert all(launches[n + 1] < reads[n] for n in range(11)) and len(device.log) == 24


def test_a_stop_is_seen_a_step_late_and_nothing_is_told_of_it(make_engine: MakeEngine) -> None:
    plain = run(make_engine(), [(PROMPTS[1], GREEDY)])[("0", 0)]
    stop = next(token for n, token in enumerate(plain[:-1]) if n >= 3 and token not in plain[:n])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    wanted = run(make_engine(), [(PROMPTS[1], params)])
    engine = make_engine()
    device = Device(engine)
    assert run(engine, [(PROMPTS[1], params)]) == wanted
    assert wanted[("0", 0)][-1] == ("stop", None)
    # One step more was launched than was read: its token is nobody's.
    kinds = [kind for kind, _ in device.log]
    assert kinds.count("launched") == kinds.count("read") + 1


MIXED: dict[str, list[tuple[list[int], SamplingParams]]] = {
    "greedy": [(prompt, GREEDY) for prompt in PROMPTS],
    "sampled": [(prompt, sampled(n)) for n, prompt in enumerate(PROMPTS)],
    "several answers": [(PROMPTS[1], sampled(3, n=3)), (PROMPTS[2], GREEDY)],
    "penalties": [(PROMPTS[1], sampled(3, repetition_penalty=1.5)), (PROMPTS[2], sampled(4))],
    "likelihoods": [(PROMPTS[1], sampled(3, logprobs=2, prompt_logprobs=1)), (PROMPTS[0], GREEDY)],
    "no end before": [
        (PROMPTS[1], sampled(5, ignore_eos=False, min_tokens=4, stop_token_ids=tuple(range(48)))),
        (PROMPTS[2], sampled(6, stop_token_ids=tuple(range(20)))),
    ],
    "beams": [(PROMPTS[1], SamplingParams(temperature=0, max_tokens=6, beam_width=2, n=2)),
              (PROMPTS[2], GREEDY)],
    "lengths": [(PROMPTS[1], sampled(n, max_tokens=n + 1)) for n in range(4)],
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 1, "kv_blocks": 64},
        {"kv_blocks": 9},
        {"max_batch_tokens": 5, "max_running": 3},
        {"batching": "static", "max_running": 2},
        {"prefix_caching": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MIXED)
def test_answers_are_the_same(name: str, settings: dict[str, Any], make_engine: MakeEngine) -> None:
    """Where blocks run out, where somebody waits and where the host decides, a step waits."""
    wanted = run(make_engine(deterministic=True, **settings), MIXED[name])
    engine = make_engine(deterministic=True, **settings)
    device = Device(engine)
    assert run(engine, MIXED[name]) == wanted
    assert device.log or name in ("beams", "penalties", "likelihoods")
    # Prefixes that were published while steps were under way hold what they are said to hold.
    assert run(engine, MIXED[name]) == run(make_engine(deterministic=True, **settings), MIXED[name])


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_come_and_go(seed: int, make_engine: MakeEngine) -> None:
    """Some come late, some are aborted: who is not gets the answer that they get alone."""
    drawn = random.Random(seed)
    engine = make_engine(deterministic=True, kv_blocks=drawn.choice([12, 32]), max_running=4)
    Device(engine)
    asked = {
        str(n): (
            drawn.choice(PROMPTS),
            sampled(n, stop_token_ids=tuple(range(drawn.randint(0, 9)))),
        )
        for n in range(8)
    }
    comes = {name: drawn.randint(0, 12) for name in asked}
    goes = {name: drawn.randint(1, 25) for name in asked if drawn.random() < 0.4}
    found: Found = {}
    for step in range(200):
        for name, (prompt, params) in asked.items():
            if comes[name] == step:
                engine.add(name, prompt, params)
            if goes.get(name) == step:
                engine.abort(name)
        told(found, engine.step())
        engine.check()
        if step > 25 and not engine.has_work():
            break
    assert engine.stats().blocks_used == 0
    for name, (prompt, params) in asked.items():
        alone = run(make_engine(deterministic=True), [(prompt, params)])[("0", 0)]
        mine = found.get((name, 0), [])
        if mine and mine[-1] == ("abort", None):
            assert mine[:-1] == alone[: len(mine) - 1]
        elif name not in goes or mine:
            assert mine == alone


def test_logits_that_are_not_finite_end_a_request_and_no_other(make_engine: MakeEngine) -> None:
    def broken() -> Engine:
        engine = make_engine(deterministic=True)
        (first,) = run(make_engine(deterministic=True), [(PROMPTS[1], GREEDY)]).values()
        weight = engine._runner.decoder.embedding.weight  # type: ignore[union-attr]
        weight[first[4]] = torch.nan
        return engine

    asked = [(PROMPTS[1], GREEDY), ([50, 51], sampled(1, max_tokens=3))]
    wanted = run(broken(), asked)
    engine = broken()
    Device(engine)
    found = run(engine, asked)
    assert found == wanted
    reason, error = found[("0", 0)][-1]
    assert reason == "error" and "not finite" in error


def test_a_cpu_waits_for_each_step(make_engine: MakeEngine) -> None:
    """There a launch returns when its work is done: nothing is won by going ahead."""
    engine = make_engine()
    assert not engine._runner.ahead
    engine.add("0", PROMPTS[0], GREEDY)
    engine.step()
    assert engine._flight is None
