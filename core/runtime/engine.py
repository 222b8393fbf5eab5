"""The engine: requests in, tokens out, one step at a time."""

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.config import ModelConfig
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.batch import Batch
from infopt.core.runtime.beam_group import BeamGroup
from infopt.core.runtime.block_pool import BlockPool
from infopt.core.runtime.flight import Flight, flying, go_on, launch, may_fly
from infopt.core.runtime.grammar import Constraint, Grammar, GrammarCompiler, tokenizer_source
from infopt.core.runtime.kv_cache import KVCache, blocks_that_fit, cache_dtype
from infopt.core.runtime.limits import (
    check_request,
    held_sequence,
    longest_sequence,
    read_eos_token_ids,
    requested_length,
)
from infopt.core.runtime.loaded import load_for
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.pooling import embedding, pool
from infopt.core.runtime.prefix_cache import PrefixCache
from infopt.core.runtime.prefix_tiers import open_store
from infopt.core.runtime.request import FinishReason, Joined, Request, SamplingParams, StepOutput
from infopt.core.runtime.sampler import Choice, draw_for
from infopt.core.runtime.scheduler import Rules, Scheduler
from infopt.core.runtime.scoring import score, scores
from infopt.core.runtime.stats import EngineStats, Meter
from infopt.core.runtime.step_memory import step_bytes
from infopt.core.runtime.step_program import Room

# While a batch gathers, a step returns this often, so that aborts and new requests are heeded.
_NAP_S = 0.002


class Engine:
    """Continuous batching over a paged KV cache; single-threaded; knows tokens, no text."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        settings: EngineSettings,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        grammars: Callable[[], GrammarCompiler] | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.cache_tokens = runner.cache.blocks * runner.cache.block_size
        vocabulary = runner.decoder.config.vocab_size
        self.eos_token_ids = frozenset(token for token in eos_token_ids if token < vocabulary)
        self._runner = runner
        self._grammars = grammars
        self._pool = BlockPool(runner.cache.blocks)
        self._prefix = (
            PrefixCache(self._pool, runner.cache.block_size, runner.store)
            if settings.prefix_caching
            else None
        )
        self._scheduler = Scheduler(
            self._pool,
            Rules.of(settings, self._pool.total, runner.decoder.config.sliding_window),
            block_size=runner.cache.block_size,
            prefix=self._prefix,
        )
        self._requests: dict[str, list[Request]] = {}
        """By id, the answers that are not complete, or the beams."""
        self._beams: dict[str, BeamGroup] = {}
        self._aborted: list[StepOutput] = []
        self._flight: Flight | None = None
        """The step that is under way, between two calls of `step`."""
        self._seeds = random.Random(settings.seed)
        self._meter = Meter()
        self.joined: Sequence[Joined] = ()
        """Who waits no longer since the last step."""

    @classmethod
    def load(cls, artifact: Artifact, settings: EngineSettings) -> "Engine":
        """Load the weights and set the KV cache up.

        Raises UnsupportedError for a model the decoder does not know, UsageError for a
        `max_model_len` beyond the model's, ResourceError where memory or cache do not suffice.
        """
        config = ModelConfig.from_hf(artifact.config)
        limit = longest_sequence(config, settings)
        name = choose_device(settings.device)
        device, dtype = torch.device(name), getattr(torch, choose_dtype(settings.dtype, name))
        decoder = load_for(settings, artifact, dtype, device)
        kept = cache_dtype(settings.kv_dtype, artifact, dtype)
        blocks = settings.kv_blocks or blocks_that_fit(
            config,
            block_size=settings.block_size,
            dtype=kept,
            device=device,
            enough=settings.max_running * -(-limit // settings.block_size),
            step_bytes=step_bytes(decoder, settings, kept),
            on_card=decoder.card is not None,
        )
        cache = KVCache.of(decoder, blocks=blocks, block_size=settings.block_size, dtype=kept)
        ends = read_eos_token_ids(artifact)

        @functools.cache
        def grammars() -> GrammarCompiler:
            return GrammarCompiler(tokenizer_source(artifact), config.vocab_size, ends)

        return cls(
            ModelRunner.recorded(
                settings.kernels,
                decoder,
                cache,
                open_store(artifact, settings, decoder, cache, kept),
                Room(settings.max_running, limit),
            ),
            settings=settings,
            max_model_len=held_sequence(limit, blocks * settings.block_size, settings),
            eos_token_ids=ends,
            grammars=grammars,
        )

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Queue a request.

        Raises UsageError for a prompt that is empty, has tokens the model does not know, or with
        its `max_tokens` is longer than `max_model_len`, for a grammar that is none, and for an id
        that is in use; UnsupportedError where grammars do not work.
        """
        if request_id in self._requests:
            raise UsageError(f"there is a request {request_id!r} already")
        check_request(prompt, params, self._runner.decoder.config.vocab_size)
        max_length = requested_length(len(prompt), params, self.max_model_len)
        drawn = self._seeds.getrandbits(63)
        request = Request(
            request_id=request_id,
            params=params,
            tokens=list(prompt),
            max_length=max_length,
            generator=torch.Generator().manual_seed(drawn if params.seed is None else params.seed),
            prompt_length=len(prompt),
            ends=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self.eos_token_ids),
            constraint=self._constraint(params.grammar),
            forks=0 if params.beam_width > 1 else params.n - 1,
        )
        if params.beam_width > 1:
            self._beams[request_id] = BeamGroup(request)
        self._requests[request_id] = [request]
        self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its answers that has begun; the next step says so.

        What is over, or never was, is left alone; so is the first of several answers as long as the
        others are still to come from it.
        """
        if index is None or request_id in self._beams:
            if request_id in self._requests:
                self._aborted += self._end_all(request_id, "abort")
            return
        for request in list(self._requests.get(request_id, ())):
            if request.index == index and not request.forks:
                self._finish(request)
                self._aborted.append(StepOutput(request_id, finish_reason="abort", index=index))

    def step(self) -> list[StepOutput]:
        """Compute one batch and return what it added; requests that only caught up say nothing."""
        outputs, self._aborted = self._aborted, []
        if self._flight is not None:
            self.joined = ()
            return outputs + self._land(self._flight)
        began = time.perf_counter()
        step = self._scheduler.schedule()
        self.joined = step.joined
        if not step.work:
            if not outputs:
                time.sleep(min(self._scheduler.gathers_for(), _NAP_S))
            return outputs
        batch, hidden, logits, times = launch(self._runner, step, began)
        if self._runner.ahead and may_fly(batch, step):
            return outputs + self._land(flying(self._runner, step, batch, logits, times))
        self._scheduler.advance(step)
        outputs += self._read(batch, hidden)
        outputs += self._extend_beams(batch, logits)
        requests, rows = self._answers(batch)
        if rows != list(range(len(logits))):
            logits = logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
        choices = self._runner.choose(logits, [draw_for(request) for request in requests])
        for request, choice, row in zip(requests, choices, rows, strict=True):
            lost = choice.token_id is None and choice.fault is None
            fault = self._unsampled(batch, row) if lost else choice.fault
            outputs.append(self._take(request, choice, fault))
        tokens = sum(item.tokens for item in step.work)
        self._meter.count(tokens, (*times, time.perf_counter()))
        return outputs

    def _land(self, flight: Flight) -> list[StepOutput]:
        """Read a step's tokens, the next one being launched before where that can be."""
        alive = [item for item in flight.step.work if self._lives(item.request)]
        self._scheduler.advance(replace(flight.step, work=alive))
        going = [item.request for item in alive]
        self._flight = go_on(self._runner, self._scheduler, flight, going)
        outputs, waited = [], time.perf_counter()
        each = zip(flight.requests, flight.chosen.read(), strict=True)
        for row, (request, choice) in enumerate(each):
            if self._lives(request):  # else it ended a step ago: this token is nobody's
                lost = choice.token_id is None and choice.fault is None
                fault = self._unsampled(flight.batch, row) if lost else choice.fault
                outputs.append(self._take(request, choice, fault))
        if self._flight is not None and not any(map(self._lives, self._flight.requests)):
            self._flight = None
        ended = flight.times[-1] + time.perf_counter() - waited
        self._meter.count(sum(item.tokens for item in alive), (*flight.times, ended))
        return outputs

    def _lives(self, request: Request) -> bool:
        return request in self._requests.get(request.request_id, ())

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return bool(self._requests or self._aborted)

    def save_prefixes(self) -> None:
        """Put on disk, where `prefix_disk` is set, all that is known of prefixes."""
        self._runner.save(self._pool.named())

    def stats(self) -> EngineStats:
        scheduler, store, meter = self._scheduler, self._runner.store, self._meter
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=self._pool.total,
            blocks_used=self._pool.used,
            blocks_free=self._pool.free,
            blocks_cached=self._pool.cached,
            host_bytes=0 if store is None else store.nbytes,
            disk_bytes=0 if store is None or store.below is None else store.below.nbytes,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            replayed=self._runner.replays.count,
            not_replayed=self._runner.replays.reason,
            **meter.sums(),
        )

    def check(self) -> None:
        """Assert that every block is free or owned as often as it stands in tables; for tests."""
        self._pool.check(request.blocks for group in self._requests.values() for request in group)

    def _constraint(self, grammar: Grammar | None) -> Constraint | None:
        if grammar is None:
            return None
        if self._grammars is None:
            raise UsageError("this engine has no tokenizer, which a grammar needs")
        return self._grammars().compile(grammar)

    def _read(self, batch: Batch, hidden: Tensor | None) -> list[StepOutput]:
        """Note how likely the tokens of prompts were, and add up their embeddings.

        A prompt is over that has its embedding, or whose numbers are not finite.
        """
        outputs: list[StepOutput] = []
        for reading in batch.reading:
            request, rows, runner = reading.request, reading.rows, self._runner
            assert hidden is not None
            if request.params.pooling is None:
                place = score(request, hidden, rows, runner.logits)
            else:
                place = pool(request, hidden, rows, runner.states)
            if place is not None:
                fault = self._fault(batch, place, request.unread.start + 1)
                outputs += self._end_all(request.request_id, "error", fault)
            elif (found := embedding(request)) is not None:
                self._finish(request)
                outputs.append(
                    StepOutput(request.request_id, finish_reason="stop", embedding=found)
                )
        return outputs

    def _answers(self, batch: Batch) -> tuple[list[Request], list[int]]:
        """Who chooses a token now, and from which row of the logits.

        A prompt that is computed and is to have several answers is forked into them here: they all
        choose their first tokens from one row, and share the prompt's blocks.
        """
        requests: list[Request] = []
        rows: list[int] = []
        for row, request in enumerate(item.request for item in batch.sampling):
            if request.params.beam_width > 1 or request.request_id not in self._requests:
                continue
            answers = [request]
            for index in range(1, request.forks + 1):
                answers.append(request.fork(index))
                self._scheduler.fork(request, answers[-1])
            self._requests[request.request_id] += answers[1:]
            request.forks = 0
            requests += answers
            rows += [row] * len(answers)
        return requests, rows

    def _extend_beams(self, batch: Batch, logits: Tensor) -> list[StepOutput]:
        """Hand beams their logits; those of a request go on, or end, when all have theirs."""
        outputs: list[StepOutput] = []
        for row, request in enumerate(item.request for item in batch.sampling):
            name, group = request.request_id, self._beams.get(request.request_id)
            if group is None:
                continue
            if not group.hold(request, logits[row]):
                outputs += self._end_all(name, "error", self._unsampled(batch, row))
            elif group.is_ready:
                born, gone = group.advance(self._scheduler)
                self._requests[name] += born
                if not group.members:
                    outputs += group.answers()
                    del self._beams[name]
                for each in gone:
                    self._finish(each)
        return outputs

    def _end_all(
        self, name: str, reason: FinishReason, error: str | None = None
    ) -> list[StepOutput]:
        """End a request with all its answers, begun or not."""
        group = list(self._requests[name])
        unborn = range(group[0].params.n - group[0].forks, group[0].params.n)
        indices = [*(request.index for request in group), *unborn]
        if self._beams.pop(name, None) is not None:
            indices = list(range(group[0].params.n))
        for request in group:
            if self._prefix is not None and error is not None:
                self._prefix.forget(request)
            self._finish(request)
        return [StepOutput(name, finish_reason=reason, error=error, index=i) for i in indices]

    def _unsampled(self, batch: Batch, row: int) -> str:
        """What is wrong with the logits of the batch's sampled `row`."""
        place = row if batch.rows is None else int(batch.rows[row])
        return self._fault(batch, place, len(batch.sampling[row].request.tokens))

    def _fault(self, batch: Batch, place: int, length: int) -> str:
        """What is wrong with the logits of the step's row `place`, after a request's `length`."""
        layer = self._runner.first_fault(batch.inputs, place)
        return f"the logits after token {length} are not finite: {layer} is the first that is not"

    def _take(self, request: Request, choice: Choice, fault: str | None) -> StepOutput:
        """Add a chosen token to its request and see whether that ends it."""
        name, index, token = request.request_id, request.index, choice.token_id
        if token is None:
            if self._prefix is not None:
                self._prefix.forget(request)
            self._finish(request)
            refused = choice.fault is not None
            return StepOutput(
                name, finish_reason="error", error=fault, index=index, refused=refused
            )
        told = scores(request)
        if token in request.ends:
            self._finish(request)
            return StepOutput(name, (), "stop", None, None, index, told, end=choice.logprob)
        request.tokens.append(token)
        reason, error = self._progress(request, token)
        if reason is not None:
            self._finish(request)
        if error is not None:
            return StepOutput(name, (), reason, error, index=index, refused=True)
        logprobs = None if choice.logprob is None else (choice.logprob,)
        return StepOutput(name, (token,), reason, None, logprobs, index, told)

    def _progress(self, request: Request, token: int) -> tuple[FinishReason | None, str | None]:
        """Whether a token that ends nothing by itself ends its answer all the same, and why."""
        if request.constraint is not None:
            if not request.constraint.accept(token):
                return "error", f"the grammar gave up on the answer at {len(request.tokens)} tokens"
            if request.constraint.is_over:
                return "stop", None
        return ("length" if len(request.tokens) == request.max_length else None), None

    def _finish(self, request: Request) -> None:
        self._scheduler.remove(request)
        group = self._requests[request.request_id]
        group.remove(request)
        if not group:
            del self._requests[request.request_id]
