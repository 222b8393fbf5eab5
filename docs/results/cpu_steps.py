"""Measure decode steps on a CPU: replayed, and part by part with native kernels and with torch's.

    python docs/results/cpu_steps.py [MODEL] [--dtype bfloat16] [--kv-dtype auto] [--threads 1 2]
        [--contexts 128 1024 4096] [--batch 1] [--rounds 15]

All in one process, the three in turn within each round; medians. Between them memory is read, as
fast as as many threads can: `% of reading` is the bytes of weights, keys and values that a step
reads, over its time and that speed. The caches hold noise: a step takes the same time whatever
they hold.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

from infopt.core.libraries import hush, share_cores

share_cores()  # before torch is loaded
hush()

import torch  # noqa: E402, TID253

from infopt.core.artifact.locate import locate  # noqa: E402
from infopt.core.models.decoder import Decoder  # noqa: E402
from infopt.core.recipe.serve import EngineSettings  # noqa: E402
from infopt.core.runtime.batch import Span, step_inputs  # noqa: E402
from infopt.core.runtime.kv_cache import KVCache, block_bytes, cache_dtype  # noqa: E402
from infopt.core.runtime.loaded import load_for  # noqa: E402
from infopt.core.runtime.model_runner import ModelRunner  # noqa: E402
from infopt.kernels.attention.eight_bits import fill_with_noise  # noqa: E402
from infopt.kernels.cpu.native import ReadArgs, call, load  # noqa: E402

CPU, BLOCK = torch.device("cpu"), 16


class Reading:
    """Bytes a second at which so many threads read memory."""

    def __init__(self, threads: int, size: int = 256 << 20) -> None:
        self._native, self._threads = load(), threads
        self._words = torch.ones(size // 8, dtype=torch.int64)
        self._sums = torch.zeros(1024, dtype=torch.int64)
        words, sums = self._words.data_ptr(), self._sums.data_ptr()
        self._args = ReadArgs(words, self._words.numel(), sums)
        self._call = call(self._native.op("read", ReadArgs), self._args, 4 * threads)

    def __call__(self) -> float:
        began = perf_counter()
        self._native.run_one(self._call, self._threads)
        return self._words.nbytes / (perf_counter() - began)


def spans_of(batch: int, context: int) -> list[Span]:
    width = -(-context // BLOCK)
    return [Span([17 + r], context - 1, range(r, batch * width, batch)) for r in range(batch)]


def measure(
    decoders: dict[str, Decoder], kept: torch.dtype, batch: int, context: int, rounds: int
) -> tuple[dict[str, float], float, dict[str, float], int]:
    """Seconds of each way, bytes a second, seconds by operator of a replay, bytes of the cache."""
    config = decoders["native"].config
    cache = KVCache(
        config, blocks=batch * -(-context // BLOCK), block_size=BLOCK, dtype=kept, device=CPU
    )
    for layer in cache.layers:
        fill_with_noise(layer)
    replaying = ModelRunner.recorded("native", decoders["native"], cache)
    if replaying.replays.reason is not None:
        raise SystemExit(replaying.replays.reason)
    spans = spans_of(batch, context)

    def step(runner: ModelRunner) -> float:
        began = perf_counter()
        inputs = step_inputs(spans, block_size=BLOCK, dtype=runner.decoder.dtype, device=CPU)
        runner.run(inputs)
        return perf_counter() - began

    ways: dict[str, Callable[[], float]] = {"replayed": lambda: step(replaying)}
    for name, decoder in decoders.items():
        runner = ModelRunner(decoder, cache)
        ways[f"part by part, {name}"] = lambda runner=runner: step(runner)  # type: ignore[misc]
    reading = Reading(torch.get_num_threads())
    times: dict[str, list[float]] = {name: [] for name in ways}
    speeds, operators = [], list[dict[str, float]]()
    for number in range(rounds + 2):
        speed = reading()
        took = {name: way() for name, way in ways.items()}
        program = replaying.replays.program
        assert program is not None
        inputs = step_inputs(spans, block_size=BLOCK, dtype=torch.float32, device=CPU)
        split = program.times(inputs).operators
        if number >= 2:
            speeds.append(speed)
            operators.append(split)
            for name, seconds in took.items():
                times[name].append(seconds)
    by_operator = {name: median(one[name] for one in operators) for name in operators[0]}
    moved = batch * context * block_bytes(config, BLOCK, kept) // BLOCK
    return {n: median(t) for n, t in times.items()}, median(speeds), by_operator, moved


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "int8"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    artifact, dtype = locate(args.model), getattr(torch, args.dtype)
    decoders = {
        kernels: load_for(
            EngineSettings(kernels=kernels, device="cpu", dtype=args.dtype), artifact, dtype, CPU
        )
        for kernels in ("native", "torch")
    }
    kept = cache_dtype(args.kv_dtype, artifact, dtype)
    weights = decoders["native"].step_bytes
    heads = ("threads", "context", "GB/s read", "replayed ms", "% of reading")
    print("| " + " | ".join((*heads, "part by part, native", "part by part, torch")) + " |")
    print("|---|---|---|---|---|---|---|")
    shares = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for context in args.contexts:
            times, speed, split, moved = measure(decoders, kept, args.batch, context, args.rounds)
            shares.append((threads, context, split))
            first, *others = times.values()
            share = (weights + moved) / first / speed
            ratios = " | ".join(f"{1e3 * t:.1f} ({t / first:.2f}x)" for t in others)
            print(f"| {threads} | {context} | {speed / 1e9:.1f} | {1e3 * first:.2f} "
                  f"| {100 * share:.0f} | {ratios} |", flush=True)  # fmt: skip
    names = list(shares[0][2])
    print("\n| threads | context | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for threads, context, split in shares:
        print(f"| {threads} | {context} | " +
              " | ".join(f"{1e3 * split[n]:.2f}" for n in names) + " |")  # fmt: skip


if __name__ == "__main__":
    main()
