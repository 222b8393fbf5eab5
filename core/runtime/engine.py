"""The engine: requests in, tokens out, one step at a time."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infopt.core.artifact.read import Artifact, read_json
from infopt.core.errors import ResourceError, UsageError
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.config import ModelConfig, token_ids
from infopt.core.models.load import load_decoder
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.batch import Batch, build_batch
from infopt.core.runtime.block_pool import BlockPool
from infopt.core.runtime.kv_cache import KVCache, blocks_that_fit, cache_dtype
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.request import FinishReason, Request, SamplingParams, StepOutput
from infopt.core.runtime.sampler import Choice, sample
from infopt.core.runtime.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine as it stands between two steps."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_free: int
    preemptions: int
    steps: int


class Engine:
    """Continuous batching over a paged KV cache; single-threaded; knows tokens, no text."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        settings: EngineSettings,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self._runner = runner
        self._pool = BlockPool(runner.cache.blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=runner.cache.block_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
        )
        self._requests: dict[str, Request] = {}
        self._aborted: list[StepOutput] = []
        self._seeds = random.Random(settings.seed)
        self._steps = 0

    @classmethod
    def load(cls, artifact: Artifact, settings: EngineSettings) -> "Engine":
        """Load the weights and set the KV cache up.

        Raises UnsupportedError for a model the decoder does not know, UsageError for a
        `max_model_len` beyond the model's, ResourceError where memory or cache do not suffice.
        """
        config = ModelConfig.from_hf(artifact.config)
        limit = _longest(config, settings)
        name = choose_device(settings.device)
        device, dtype = torch.device(name), getattr(torch, choose_dtype(settings.dtype, name))
        decoder = load_decoder(artifact, dtype, device, deterministic=settings.deterministic)
        kept = cache_dtype(settings.kv_dtype, artifact, dtype)
        blocks = settings.kv_blocks or blocks_that_fit(
            config,
            block_size=settings.block_size,
            dtype=kept,
            device=device,
            enough=settings.max_running * -(-limit // settings.block_size),
        )
        cache = KVCache(
            config, blocks=blocks, block_size=settings.block_size, dtype=kept, device=device
        )
        return cls(
            ModelRunner(decoder, cache),
            settings=settings,
            max_model_len=_held(limit, blocks * settings.block_size, settings),
            eos_token_ids=read_eos_token_ids(artifact),
        )

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Queue a request.

        Raises UsageError for a prompt that is empty, has tokens the model does not know, or with
        its `max_tokens` is longer than `max_model_len`, and for an id that is in use.
        """
        vocabulary = self._runner.decoder.config.vocab_size
        if request_id in self._requests:
            raise UsageError(f"there is a request {request_id!r} already")
        if not prompt:
            raise UsageError("the prompt is empty")
        if not all(0 <= token < vocabulary for token in prompt):
            raise UsageError(f"the prompt has a token that is not among the model's {vocabulary}")
        request = Request(
            request_id=request_id,
            params=params,
            tokens=list(prompt),
            max_length=self._max_length(len(prompt), params.max_tokens),
            generator=torch.Generator(),
        )
        drawn = self._seeds.getrandbits(63)
        request.generator.manual_seed(drawn if params.seed is None else params.seed)
        self._requests[request_id] = request
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; the next step says so. One that is over, or never was, is left alone."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request)
            self._aborted.append(StepOutput(request_id, finish_reason="abort"))

    def step(self) -> list[StepOutput]:
        """Compute one batch and return what it added; requests that only caught up say nothing."""
        outputs, self._aborted = self._aborted, []
        work = self._scheduler.schedule()
        if not work:
            return outputs
        cache, decoder = self._runner.cache, self._runner.decoder
        batch = build_batch(
            work, block_size=cache.block_size, dtype=decoder.dtype, device=decoder.device
        )
        logits = self._runner.run(batch.inputs, batch.rows)
        self._scheduler.advance(work)
        self._steps += 1
        requests = [item.request for item in batch.sampling]
        choices = sample(logits, [r.params for r in requests], [r.generator for r in requests])
        faults = [
            self._fault(batch, row) if choice.token_id is None else ""
            for row, choice in enumerate(choices)
        ]
        return outputs + [
            self._take(request, choice, fault)
            for request, choice, fault in zip(requests, choices, faults, strict=True)
        ]

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return bool(self._requests or self._aborted)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks_total=self._pool.total,
            blocks_used=self._pool.used,
            blocks_free=self._pool.free,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
        )

    def check(self) -> None:
        """Assert that every block is free or in exactly one table; for tests and for debugging."""
        self._pool.check()
        held = [block for request in self._requests.values() for block in request.blocks]
        assert len(held) == len(set(held)) == self._pool.used

    def _fault(self, batch: Batch, row: int) -> str:
        """What is wrong with the logits of the batch's sampled `row`."""
        place = row if batch.rows is None else int(batch.rows[row])
        layer = self._runner.first_fault(batch.inputs, place)
        length = len(batch.sampling[row].request.tokens)
        return f"the logits after token {length} are not finite: {layer} is the first that is not"

    def _take(self, request: Request, choice: Choice, fault: str) -> StepOutput:
        """Add a chosen token to its request and see whether that ends it."""
        name, token = request.request_id, choice.token_id
        if token is None:
            self._finish(request)
            return StepOutput(name, finish_reason="error", error=fault)
        if self._stops(request.params, token):
            self._finish(request)
            return StepOutput(name, finish_reason="stop")
        request.tokens.append(token)
        reason: FinishReason | None = None
        if len(request.tokens) == request.max_length:
            self._finish(request)
            reason = "length"
        logprobs = None if choice.logprob is None else (choice.logprob,)
        return StepOutput(name, (token,), reason, logprobs=logprobs)

    def _stops(self, params: SamplingParams, token: int) -> bool:
        ends = not params.ignore_eos and token in self.eos_token_ids
        return ends or token in params.stop_token_ids

    def _finish(self, request: Request) -> None:
        self._scheduler.remove(request)
        del self._requests[request.request_id]

    def _max_length(self, prompt: int, max_tokens: int | None) -> int:
        length = self.max_model_len if max_tokens is None else prompt + max_tokens
        if max(length, prompt + 1) > self.max_model_len:
            asked = "" if max_tokens is None else f" and {max_tokens} new ones"
            raise UsageError(
                f"{prompt} prompt tokens{asked} do not fit: this engine holds {self.max_model_len}",
                "shorten the prompt, lower max_tokens, or raise --max-model-len or --kv-blocks",
            )
        return length


def read_eos_token_ids(artifact: Artifact) -> frozenset[int]:
    """The tokens that end a sequence: of generation_config.json, else of config.json."""
    file = artifact.path / "generation_config.json"
    found = token_ids(read_json(file).get("eos_token_id")) if file.exists() else ()
    return frozenset(found or token_ids(artifact.config.get("eos_token_id")))


def _longest(config: ModelConfig, settings: EngineSettings) -> int:
    """The longest sequence asked for, else the longest that the model knows."""
    asked = settings.max_model_len
    if asked is None:
        return config.full_attention_positions
    if asked > config.max_positions:
        raise UsageError(
            f"max_model_len {asked} is beyond the {config.max_positions} positions of the model"
        )
    return asked


def _held(limit: int, slots: int, settings: EngineSettings) -> int:
    """`limit`, or what the cache holds where no limit was asked for."""
    if settings.max_model_len is not None and slots < limit:
        raise ResourceError(
            f"a sequence of {limit} tokens does not fit into the KV cache of {slots}",
            "lower --max-model-len or raise --kv-blocks",
        )
    return min(limit, slots)
