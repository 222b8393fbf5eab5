"""What the API adds: the same load on the engine in process and through the server, in turns.

    python docs/results/serving_overhead.py [--rounds 3] [--model DIR] [--threads 1]
        [--concurrency 1 8]

Each turn is an `infopt bench` of its own (closed loop, 1 and 8 in flight); both engines have
the same threads. Printed are the medians over the rounds: added TTFT, and tokens/s over those in
process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

INFOPT = str(Path(sys.executable).parent / "infopt")


def bench(target: list[str], given: argparse.Namespace, concurrency: int) -> dict[str, Any]:
    """One run of the load; its report."""
    load = ["--requests", given.requests, "--concurrency", concurrency, "--warmup", 1]
    load += ["--prompt-tokens", 128, "--output-tokens", 64, "--json", "-", "--quiet"]
    done = subprocess.run(
        [INFOPT, "bench", *target, *map(str, load)], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="default")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    with tempfile.NamedTemporaryFile("w+") as log:
        words = [INFOPT, "serve", given.model, "--port", "0", "--no-prefix-caching"]
        server = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            url = url_of(Path(log.name))
            for concurrency in given.concurrency:
                compare(url, given, concurrency)
        finally:
            server.terminate()
            server.wait(60)


def compare(url: str, given: argparse.Namespace, concurrency: int) -> None:
    """Both ways in turns, and what the one is over the other."""
    found: dict[str, list[dict[str, Any]]] = {"in process": [], "served": []}
    for _ in range(given.rounds):
        here = [given.model, "--no-prefix-caching"]
        found["in process"].append(bench(here, given, concurrency))
        found["served"].append(bench(["--url", url], given, concurrency))
    for name, runs in found.items():
        print(json.dumps({"concurrency": concurrency, "target": name, **summary(runs)}))
    here_told, served = (summary(found[name]) for name in ("in process", "served"))
    told = {
        "concurrency": concurrency,
        "added_ttft_p50_s": served["ttft_p50_s"] - here_told["ttft_p50_s"],
        "ttft_p50_ratio": served["ttft_p50_s"] / here_told["ttft_p50_s"],
        "tpot_p50_ratio": served["tpot_p50_s"] / here_told["tpot_p50_s"],
        "tokens_per_s_ratio": served["tokens_per_s"] / here_told["tokens_per_s"],
    }
    print(json.dumps(told), flush=True)


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "ttft_p50_s": median(run["ttft_s"]["p50"] for run in runs),
        "tpot_p50_s": median(run["tpot_s"]["p50"] for run in runs),
        "tokens_per_s": median(run["output_tokens_per_s"] for run in runs),
    }


def url_of(log: Path) -> str:
    for _ in range(1200):
        for line in log.read_text().splitlines():
            if "listening on " in line:
                return line.split("listening on ")[1].split()[0]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")


if __name__ == "__main__":
    main()
