"""How the engine computes steps, and what it takes itself for one, for the calibration."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from infopt.core.artifact.write import write_directory
from infopt.core.hardware.native import find_native
from infopt.core.models.decoder import Decoder, StepInputs
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import SamplingParams
from infopt.core.runtime.step_program import recorded

HIDDEN = 64
"""Of the model; it has one layer."""
PROMPT = 16
_STEPS = 40


def engine_steps(
    settings: EngineSettings, device: torch.device
) -> Callable[[Decoder, Sequence[Tensor]], Callable[[StepInputs], object]]:
    """How an engine computes steps of any decoder over given caches: replayed where it would be.

    Raises as `find_native`.
    """
    native = find_native(settings.kernels) if device.type == "cpu" else None

    def steps(decoder: Decoder, caches: Sequence[Tensor]) -> Callable[[StepInputs], object]:
        replays = recorded(native, decoder, caches)

        def step(inputs: StepInputs) -> object:
            found = replays.logits(inputs)
            if found is None:
                found = decoder.logits(decoder(inputs, caches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return found

        return step

    return steps


def engine_step_seconds(batch: int, vocab_size: int, settings: EngineSettings) -> float:
    """Median seconds of a greedy decode step of `batch` requests on a one-layer random model."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = write_directory(
            Path(folder) / "tiny",
            tensors=_tensors(vocab_size),
            config=tiny_config(vocab_size),
            files={},
        )
        engine = Engine.load(artifact, settings)
        params = SamplingParams(max_tokens=_STEPS + 8, temperature=0.0, ignore_eos=True)
        for number in range(batch):
            prompt = [(number + place) % vocab_size for place in range(PROMPT)]
            engine.add(f"step-{number}", prompt, params)
        times: list[float] = []
        while engine.has_work():
            started = perf_counter()
            outputs = engine.step()
            if len(outputs) == batch:  # the others are prefills and the last ones
                times.append(perf_counter() - started)
        return statistics.median(times[4:])


def tiny_config(vocab_size: int) -> dict[str, object]:
    """Of the model that is run, one small layer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }


def _tensors(vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    drawn = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.05 * torch.randn(*shape, generator=drawn)

    layer = "model.layers.0"
    yield "model.embed_tokens.weight", random(vocab_size, HIDDEN)
    yield f"{layer}.input_layernorm.weight", torch.ones(HIDDEN)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{layer}.self_attn.{part}.weight", random(HIDDEN, HIDDEN)
    yield f"{layer}.post_attention_layernorm.weight", torch.ones(HIDDEN)
    for part in ("gate_proj", "up_proj"):
        yield f"{layer}.mlp.{part}.weight", random(2 * HIDDEN, HIDDEN)
    yield f"{layer}.mlp.down_proj.weight", random(HIDDEN, 2 * HIDDEN)
    yield "model.norm.weight", torch.ones(HIDDEN)
