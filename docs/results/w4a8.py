"""What `--activations int8` costs and gains: a 4-bit model's logits and decode steps, with it and
without.

    python docs/results/w4a8.py MODEL [TOKENS]
"""

import statistics
import sys
import time

import torch  # noqa: TID253

from infopt.core.artifact.locate import locate
from infopt.core.artifact.read import Artifact
from infopt.core.models.decoder import StepInputs
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.loaded import load_for
from infopt.core.runtime.request import SamplingParams
from infopt.core.text.sources import evaluation_text
from infopt.core.text.windows import token_stream
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention

WINDOW, BLOCK = 256, 16
CPU, DTYPE = torch.device("cpu"), torch.bfloat16


def settings(activations: str) -> EngineSettings:
    return EngineSettings.model_validate({"kernels": "native", "activations": activations})


@torch.inference_mode()
def logprobs(artifact: Artifact, activations: str, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Of each window, float32 [WINDOW, vocabulary]."""
    decoder = load_for(settings(activations), artifact, DTYPE, CPU)
    config, blocks = decoder.config, WINDOW // BLOCK
    found = []
    for window in tokens.split(WINDOW):
        caches = [
            new_cache(blocks, BLOCK, config.kv_heads, config.head_dim, DTYPE, CPU)
            for _ in range(config.layers)
        ]
        plan = plan_attention([list(range(blocks))], [WINDOW], [0, WINDOW], BLOCK, DTYPE, CPU)
        every = torch.arange(WINDOW)
        hidden = decoder(StepInputs(window, every, every, plan), caches)
        found.append(decoder.logits(hidden).float().log_softmax(-1))
    return found


def quality(artifact: Artifact, count: int) -> None:
    stream = token_stream(
        evaluation_text("default"), artifact.tokenizer(), chat=False, limit=count + 1
    ).flatten()
    tokens = stream[: count // WINDOW * WINDOW]
    exact, rounded = (logprobs(artifact, word, tokens) for word in ("auto", "int8"))
    divergence, same, losses = [], [], {"auto": 0.0, "int8": 0.0}
    for window, one, other in zip(tokens.split(WINDOW), exact, rounded, strict=True):
        divergence.append((one.exp() * (one - other)).sum(-1).mean())
        same.append((one.argmax(-1) == other.argmax(-1)).float().mean())
        for word, each in (("auto", one), ("int8", other)):
            losses[word] -= float(each[:-1].gather(1, window[1:, None]).mean()) / len(exact)
    kl, top = float(torch.stack(divergence).mean()), float(torch.stack(same).mean())
    ppl = {word: 2.718281828**loss for word, loss in losses.items()}
    print(f"{len(tokens)} tokens: KL {kl:.5f} nats, the same top token {100 * top:.2f}%, {ppl}")


def step_ms(engine: Engine, name: str, rows: int) -> float:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    for row in range(rows):
        engine.add(f"{name}-{row}", list(range(100, 228)), params)
    times = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[-40:]) * 1e3


def main() -> None:
    artifact = locate(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    engines = {word: Engine.load(artifact, settings(word)) for word in ("auto", "int8")}
    for rows in (1, 8):
        times: dict[str, list[float]] = {word: [] for word in engines}
        for turn in range(5):
            for word, engine in engines.items():
                times[word].append(step_ms(engine, f"{rows}-{turn}", rows))
        told = {word: f"{statistics.median(each):.2f} ms" for word, each in times.items()}
        print(f"decode, {rows} requests at 128 to 188: {told}")
    if count:
        quality(artifact, count)


if __name__ == "__main__":
    main()
