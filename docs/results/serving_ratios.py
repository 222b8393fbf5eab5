"""Measure the ratios of docs/results/serving.md, on the default model.

    python docs/results/serving_ratios.py --output serving.jsonl [--only NAME ...] [--rounds 3]
    python docs/results/serving_ratios.py --output serving.jsonl --print

All in one process, in float32 unless --dtype says otherwise, the variants of a case one after the
other within each round. Every measurement is a line of the file; those that it has already are not
made again. The tables that are printed hold medians over rounds.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from infopt.core.libraries import hush, share_cores

share_cores()  # before torch is loaded
hush()

import torch  # noqa: E402, TID253
from serving_peers import continuous, padded  # noqa: E402
from serving_tables import tables  # noqa: E402

from infopt.core.artifact.locate import locate  # noqa: E402
from infopt.core.evaluation.divergence import divergence  # noqa: E402
from infopt.core.evaluation.perplexity import token_nll  # noqa: E402
from infopt.core.models.hf import load_transformers  # noqa: E402
from infopt.core.recipe.serve import EngineSettings  # noqa: E402
from infopt.core.runtime.batch import Span, step_inputs  # noqa: E402
from infopt.core.runtime.engine import Engine  # noqa: E402
from infopt.core.runtime.kv_cache import KVCache, block_bytes  # noqa: E402
from infopt.core.runtime.loaded import load_for  # noqa: E402
from infopt.core.runtime.model_runner import ModelRunner  # noqa: E402
from infopt.core.runtime.request import SamplingParams  # noqa: E402
from infopt.core.text.sources import evaluation_text  # noqa: E402
from infopt.core.text.windows import token_stream  # noqa: E402

Row = dict[str, Any]
BLOCK = 16
KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Load:
    """Requests that are all there at once."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def lengths(self) -> list[int]:
        """At the end, the longest first."""
        both = zip(self.prompts, self.outputs, strict=True)
        return sorted((len(prompt) + output for prompt, output in both), reverse=True)

    def slots(self, seats: int) -> int:
        """What so many at a time take at most."""
        return sum(self.lengths[:seats])


class Bench:
    """The model, loaded once for all engines, and loads of any size."""

    def __init__(self, dtype: str, scale: float) -> None:
        self.artifact = locate(None)
        self.dtype: torch.dtype = getattr(torch, dtype)
        settings = EngineSettings(device="cpu", dtype=dtype)
        self.decoder = load_for(settings, self.artifact, self.dtype, torch.device("cpu"))
        self.scale = scale
        self._reference: Any = None

    @property
    def reference(self) -> Any:
        """The same model in transformers."""
        if self._reference is None:
            self._reference = load_transformers(self.artifact, self.dtype, torch.device("cpu"))
        return self._reference

    def scaled(self, number: int, least: int = 1) -> int:
        """For a short run that only shows that all works."""
        return max(least, round(number * self.scale))

    def tokens(self, count: int, seed: str) -> list[int]:
        """Uniform, so that no two prompts begin alike."""
        vocabulary = self.decoder.config.vocab_size
        return random.Random(seed).choices(range(vocabulary), k=count)

    def load(self, requests: int = 32, seed: int = 0) -> Load:
        """Prompts of 32 to 512 tokens, answers of 16 to 128."""
        chance, count = random.Random(seed), self.scaled(requests, 12)
        lengths = [self.scaled(chance.randint(32, 512), 4) for _ in range(count)]
        outputs = [self.scaled(chance.randint(16, 128), 2) for _ in range(count)]
        return Load([self.tokens(n, f"{seed}/{i}") for i, n in enumerate(lengths)], outputs)

    def engine(self, slots: int, kv: torch.dtype | None = None, **settings: Any) -> Engine:
        """A new one, its cache empty, that holds so many tokens besides the ends of 64 blocks."""
        blocks, config = -(-slots // BLOCK) + 64, self.decoder.config
        cache = KVCache(
            config,
            blocks=blocks,
            block_size=BLOCK,
            dtype=kv or self.dtype,
            device=torch.device("cpu"),
        )
        return Engine(
            ModelRunner.recorded("auto", self.decoder, cache),
            settings=EngineSettings(block_size=BLOCK, **settings),
            max_model_len=min(config.max_positions, blocks * BLOCK),
            eos_token_ids=frozenset(),
        )


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(tokens, temperature=0, ignore_eos=True)


def enter(engine: Engine, load: Load) -> None:
    for index, (prompt, output) in enumerate(zip(load.prompts, load.outputs, strict=True)):
        engine.add(str(index), prompt, greedy(output))


def finish(engine: Engine) -> float:
    """Seconds until nothing is left to do."""
    began = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - began


def serve(engine: Engine, load: Load) -> Row:
    enter(engine, load)
    seconds = finish(engine)
    rate = sum(load.outputs) / seconds
    return {"seconds": seconds, "output_tokens_per_s": rate, "steps": engine.stats().steps}


def decode_steps(load: Load, seats: int, *, static: bool) -> int:
    """Steps that choose tokens, if prompts took none: by the longest of a batch, or by seats."""
    if static:
        starts = range(0, len(load.outputs), seats)
        return sum(max(load.outputs[start : start + seats]) for start in starts)
    free = [0] * seats
    for output in load.outputs:
        free[free.index(min(free))] += output
    return max(free)


def batching(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Throughput of 32 requests of varied lengths, 8 at a time."""
    load = bench.load()
    for mode in ("continuous", "static", "dynamic"):
        engine = bench.engine(load.slots(8), batching=mode, max_running=8, prefix_caching=False)
        steps = decode_steps(load, 8, static=mode != "continuous")
        yield mode, {**serve(engine, load), "predicted_steps": steps}


def waste(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Share of the reserved slots that hold no token, while requests wait."""
    load = bench.load(64)
    engine = bench.engine(load.slots(8), max_running=8, prefix_caching=False)
    enter(engine, load)
    longest = load.lengths[0]
    found: dict[str, list[float]] = {"paged": [], "own limit": [], "longest limit": []}
    while engine.has_work():
        engine.step()
        running = engine._scheduler.running
        if not engine.stats().waiting or not running:
            continue
        held = sum(request.computed for request in running)
        found["paged"].append(1 - held / (engine.stats().blocks_used * BLOCK))
        found["own limit"].append(1 - held / sum(request.max_length for request in running))
        found["longest limit"].append(1 - held / (longest * len(running)))
    for name, shares in found.items():
        yield name, {"waste": mean(shares), "steps": len(shares)}


def first_token(engine: Engine, name: str, prompt: list[int]) -> float:
    began = time.perf_counter()
    engine.add(name, prompt, greedy(1))
    while not any(output.token_ids for output in engine.step()):
        pass
    return time.perf_counter() - began


def prefix(bench: Bench) -> Iterator[tuple[str, Row]]:
    """TTFT where 1,024 of 1,056 tokens are known, and what looking for them costs where none is."""
    shared, own = bench.scaled(1024, BLOCK), bench.scaled(32)
    engine = bench.engine(2 * (shared + own))
    beginning = bench.tokens(shared, "shared")
    for name in ("cold", "warm"):
        before = engine.stats().prefix_hits
        seconds = first_token(engine, name, beginning + bench.tokens(own, name))
        yield name, {"ttft_s": seconds, "hits": engine.stats().prefix_hits - before}
    load = bench.load(16)
    for name in ("without", "with"):
        engine = bench.engine(load.slots(8), prefix_caching=name == "with", max_running=8)
        spent = watch(engine) if name == "with" else [0.0]
        row = serve(engine, load)
        yield (
            name,
            {
                **row,
                "hits": engine.stats().prefix_hits,
                "looking_share": sum(spent) / row["seconds"],
            },
        )


def watch(engine: Engine) -> list[float]:
    """Seconds of every call of the prefix cache: a cost that two whole runs differ too much for."""
    cache, spent = engine._prefix, [0.0]
    for name in ("match", "fetch", "publish"):
        setattr(cache, name, timed(getattr(cache, name), spent))
    return spent


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def called(*words: Any) -> Any:
        began = time.perf_counter()
        found = call(*words)
        spent.append(time.perf_counter() - began)
        return found

    return called


def chunked(bench: Bench) -> Iterator[tuple[str, Row]]:
    """What four streams feel of a prompt of 2,000 tokens: the times between their next 64 each."""
    length, after = bench.scaled(2000, 64), bench.scaled(64, 4)
    for name, budget in (("256", 256), ("4096", 4096)):
        engine = bench.engine(length + 4 * (128 + 2 * after), max_batch_tokens=budget)
        for stream in range(4):
            engine.add(str(stream), bench.tokens(64, str(stream)), greedy(after + 9))
        for _ in range(8):
            engine.step()
        arrived = time.perf_counter()
        engine.add("long", bench.tokens(length, "long"), greedy(1))
        last, gaps, ttft = dict.fromkeys(map(str, range(4)), arrived), [], 0.0
        while engine.has_work():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id == "long":
                    ttft = now - arrived
                else:
                    gaps.append(now - last[output.request_id])
                    last[output.request_id] = now
        yield name, {**quantiles(gaps), "ttft_s": ttft, "tokens": len(gaps)}


def quantiles(values: list[float]) -> Row:
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"itl_median_s": median(ordered), "itl_p99_s": p99, "itl_max_s": ordered[-1]}


@torch.inference_mode()
def kv_int8(bench: Bench) -> Iterator[tuple[str, Row]]:
    """1,024 held-out tokens in chunks of 128, each read with all before it from the cache."""
    count = bench.scaled(1024, 32)
    text, tokenizer = evaluation_text("default"), bench.artifact.tokenizer()
    stream = token_stream(text, tokenizer, chat=False, limit=count + 1)
    tokens, config = stream.tolist(), bench.decoder.config
    base: torch.Tensor | None = None
    for name, kv in KV_DTYPES.items():
        runner = bench.engine(count, kv)._runner
        rows = []
        for start in range(0, count, 128):
            stop = min(start + 128, count)
            span = Span(tokens[start:stop], start, range(-(-stop // BLOCK)))
            inputs = step_inputs(
                [span], block_size=BLOCK, dtype=bench.dtype, device=torch.device("cpu")
            )
            rows.append(runner.run(inputs))
        logits = torch.cat(rows)
        base = logits if base is None else base
        kl, agree = divergence(base, logits)
        yield (
            name,
            {
                "bytes_per_token": block_bytes(config, BLOCK, kv or bench.dtype) // BLOCK,
                "nll": float(token_nll(logits, stream[1:]).mean()),
                "kl": float(kl.mean()),
                "top1_agreement": float(agree.double().mean()),
                "tokens": count,
            },
        )


def throughput(bench: Bench) -> Iterator[tuple[str, Row]]:
    """32 requests: infopt, and transformers with a padded batch and with its own batching."""
    load = bench.load()
    engine = bench.engine(load.slots(32))
    yield "infopt", serve(engine, load)
    yield "generate", padded(bench.reference, load.prompts, load.outputs)
    try:
        yield "generate_batch", continuous(bench.reference, load.prompts, load.outputs)
    except Exception as error:  # whatever it refuses a CPU with is the result
        reason = str(error).strip().split("\n")[0]
        yield "generate_batch", {"refused": f"{type(error).__name__}: {reason}"}


CASES: dict[str, Callable[[Bench], Iterator[tuple[str, Row]]]] = {
    "batching": batching,
    "waste": waste,
    "prefix": prefix,
    "chunked": chunked,
    "kv-int8": kv_int8,
    "throughput": throughput,
}
COUNTED = ("waste", "kv-int8")
"""These come out alike each time: one round is enough."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="print the tables, measure nothing")
    given = parser.parse_args()
    rows = []
    if given.output.exists():
        rows = [json.loads(line) for line in given.output.read_text().splitlines()]
    if not given.print:
        rows += measure_all(given, rows)
    same = [row for row in rows if (row["dtype"], row["scale"]) == (given.dtype, given.scale)]
    titles = {case: str(measure.__doc__) for case, measure in CASES.items()}
    sys.stdout.write(tables(same, titles) + "\n")


def measure_all(given: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """The rows that are missing, each written as soon as its case's round is done."""
    keys = ("case", "round", "dtype", "scale")
    done = {tuple(row[key] for key in keys) for row in rows}
    bench, made = None, []
    for number in range(given.rounds):
        for case in given.only:
            where = (case, number, given.dtype, given.scale)
            if where in done or (number and case in COUNTED):
                continue
            if bench is None:
                bench = Bench(given.dtype, given.scale)
                serve(bench.engine(64), Load([[1] * 16], [2]))  # the first step is a slow one
            facts = {"threads": torch.get_num_threads(), "torch": torch.__version__}
            fresh = [
                {**dict(zip(keys, where, strict=True)), "variant": variant, "told": told, **facts}
                for variant, told in CASES[case](bench)
            ]
            made += fresh
            with given.output.open("a") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in fresh)
    return made


if __name__ == "__main__":
    main()
