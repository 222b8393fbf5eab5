"""OpenVINO GenAI's part of cpu_peers.py, run by a Python that has it: MODEL WORK THREADS."""

import json
import random
import sys
import time

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

VOCABULARY = 49152


def prompt(length: int, seed: int) -> ov.Tensor:
    chance = random.Random(seed)
    return ov.Tensor(np.array([[chance.randrange(100, VOCABULARY) for _ in range(length)]]))


def limited(tokens: int) -> genai.GenerationConfig:
    found = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
    found.min_new_tokens = tokens
    return found


def alone(pipe: genai.ContinuousBatchingPipeline, length: int, new: int, seed: int) -> list[float]:
    """The times of the tokens of one request, from its start."""
    began = time.perf_counter()
    handle = pipe.add_request(seed, prompt(length, seed), limited(new))
    times: list[float] = []
    while pipe.has_non_finished_requests():
        pipe.step()
        if handle.can_read():
            handle.read()
            times.append(time.perf_counter() - began)
    return times


def main() -> None:
    model, work, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 1, 32
    scheduler.max_num_batched_tokens = 1024 if work == "prefill" else 512
    scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
    options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options)
    if work == "batch":
        chance = random.Random(0)
        lengths = [(chance.randint(32, 512), chance.randint(16, 128)) for _ in range(32)]
        alone(pipe, 64, 8, 1000)
        began = time.perf_counter()
        for number, (length, new) in enumerate(lengths):
            pipe.add_request(number, prompt(length, number), limited(new))
        while pipe.has_non_finished_requests():
            pipe.step()
        speed = sum(new for _, new in lengths) / (time.perf_counter() - began)
    else:
        length, new = (128, 128) if work == "decode" else (1024, 2)
        runs = [alone(pipe, length, new, seed) for seed in range(6)][2:]
        firsts = sorted(times[0] for times in runs)
        gaps = sorted((times[-1] - times[0]) / (len(times) - 1) for times in runs)
        speed = 1024 / firsts[len(firsts) // 2] if work == "prefill" else 1 / gaps[len(gaps) // 2]
    print(json.dumps({"tokens_per_s": speed}))


if __name__ == "__main__":
    main()
