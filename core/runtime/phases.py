"""The phases of inference, one at a time, for profiling."""

from collections.abc import Callable

import torch
from torch import Tensor

from infopt.core.artifact.read import Artifact
from infopt.core.hardware.choose import choose_device, choose_dtype
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.batch import Span, step_inputs
from infopt.core.runtime.kv_cache import KVCache, cache_dtype
from infopt.core.runtime.loaded import load_for
from infopt.core.runtime.model_runner import ModelRunner
from infopt.core.runtime.step_program import NativeStep, Room, StepTimes


class PhaseRunner:
    """Drives the engine's model runner without scheduler and sampler; each call returns when done.

    The cache is as large as the phase at hand needs.
    """

    def __init__(self, artifact: Artifact, settings: EngineSettings) -> None:
        name = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, name)
        self._device = torch.device(name)
        self._block_size = settings.block_size
        self._loaded = self._decoder = load_for(
            settings, artifact, getattr(torch, self.dtype), self._device
        )
        self._kept = cache_dtype(settings.kv_dtype, artifact, self._decoder.dtype)
        self.weight_bytes = self._decoder.step_bytes
        """Bytes of weights that a decode step reads."""
        self.resident_bytes = self._decoder.resident_bytes
        """Bytes of all weights in memory."""
        self._kernels = settings.kernels
        self._tokens = torch.Generator().manual_seed(settings.seed)
        self._runner: ModelRunner | None = None
        self._decoding: list[Span] = []
        self._last: tuple[StepInputs, Tensor | None] | None = None

    def prefill(self, batch: int, tokens: int) -> None:
        """Compute `batch` prompts of `tokens` random tokens in one step, up to their logits."""
        self._run(self._runner_for(batch, tokens), self._spans(batch, tokens, new=tokens))

    def prepare_decode(self, batch: int, context: int) -> None:
        """Fill a cache for `batch` requests of `context` tokens each, the next one among them.

        Keys and values are drawn at random: a step takes the same time whatever they are.
        """
        runner = self._runner_for(batch, context)
        runner.cache.fill_with_noise()
        self._decoding = self._spans(batch, context, new=1)

    def decode_step(self) -> None:
        """One token for each request, attending to the whole context, which stays as it is."""
        assert self._decoding and self._runner, "prepare_decode comes first"
        self._run(self._runner, self._decoding)

    def replayed_times(self) -> StepTimes | None:
        """What the parts of the last step take that was run, if it was replayed: in a replay whose
        calls are made one by one."""
        program = None if self._runner is None else self._runner.replays.program
        if not isinstance(program, NativeStep) or self._last is None:
            return None
        return program.times(*self._last)

    def instrument(self, wrap: Callable[[Decoder], Decoder] | None) -> None:
        """Run what `wrap` makes of the decoder from here on; None: the decoder itself."""
        self._decoder = self._loaded if wrap is None else wrap(self._loaded)
        self._runner = None

    def _run(self, runner: ModelRunner, spans: list[Span]) -> None:
        decoder = runner.decoder
        inputs = step_inputs(
            spans, block_size=self._block_size, dtype=decoder.dtype, device=self._device
        )
        new = len(spans[0].tokens)
        rows = torch.arange(1, len(spans) + 1, device=self._device) * new - 1
        self._last = inputs, None if new == 1 else rows
        runner.run(*self._last)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _runner_for(self, batch: int, context: int) -> ModelRunner:
        blocks = batch * -(-context // self._block_size)
        if self._runner is None or self._runner.cache.blocks != blocks:
            self._runner = None  # the old cache goes before the new one comes
            cache = KVCache.of(
                self._decoder, blocks=blocks, block_size=self._block_size, dtype=self._kept
            )
            # With clocks at the operators a step is computed part by part.
            clocked = self._decoder is not self._loaded
            kernels = "torch" if clocked else self._kernels
            room = Room(batch, context)
            self._runner = ModelRunner.recorded(kernels, self._decoder, cache, room=room)
        self._decoding = []
        return self._runner

    def _spans(self, batch: int, context: int, *, new: int) -> list[Span]:
        """The last `new` of `context` tokens of each request, blocks dealt out in turn."""
        width = -(-context // self._block_size)
        drawn = torch.randint(
            self._decoder.config.vocab_size, (batch, new), generator=self._tokens
        ).tolist()
        return [Span(drawn[r], context - new, range(r, batch * width, batch)) for r in range(batch)]
