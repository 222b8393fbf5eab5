"""infopt beside llama.cpp and OpenVINO GenAI on this CPU: decode, prefill, and 32 requests at once.

    python docs/results/cpu_peers.py --output peers.jsonl --threads 2 \
        --infopt bf16=MODEL int8=DIR int4=DIR \
        [--llama-bin DIR --llama bf16=X.gguf int8=Y.gguf int4=Z.gguf] \
        [--openvino PYTHON --openvino-models bf16=DIR int8=DIR int4=DIR] \
        [--work decode prefill batch] [--rounds 3]

The engines take turns within each round, one process each, nothing else running; medians over the
rounds, and the ratio to the fastest peer of the same precision. decode: 128 prompt and 128 new
tokens, one stream, 1 / TPOT. prefill: 1,024 tokens, over the time to the first. batch: 32 requests
there from the start, prompts of 32 to 512 and outputs of 16 to 128 tokens, by a fixed seed, end of
sequence ignored: output tokens a second.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

LENGTHS = ["--prompt-tokens", "32-512", "--output-tokens", "16-128"]
ONE = ["--concurrency", "1", "--warmup", "2"]
OPENVINO = Path(__file__).with_name("cpu_peers_openvino.py")
Run = Callable[[str, str], float]


def of(command: list[str], threads: int) -> str:
    """Standard output of a command that may use so many cores."""
    cores = ",".join(map(str, range(threads)))
    done = subprocess.run(["taskset", "-c", cores, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def bench(threads: int, *words: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "infopt"), "bench", *words]
    found: dict[str, Any] = json.loads(of([*command, "--quiet", "--json", "-"], threads))
    return found


def infopt(model: str, work: str, threads: int) -> float:
    more = ["--threads", str(threads)]
    match work:
        case "decode":
            lengths = ["--prompt-tokens", "128", "--output-tokens", "128", "--requests", "4"]
            return 1 / float(bench(threads, model, *ONE, *lengths, *more)["tpot_s"]["p50"])
        case "prefill":
            lengths = ["--prompt-tokens", "1024", "--output-tokens", "2", "--requests", "6"]
            return 1024 / float(bench(threads, model, *ONE, *lengths, *more)["ttft_s"]["p50"])
    load = ["--concurrency", "32", "--requests", "32", *LENGTHS, *more]
    return float(bench(threads, model, *load)["output_tokens_per_s"])


def llama(folder: Path, model: str, work: str, threads: int) -> float:
    if work == "batch":
        return _llama_server(folder, model, threads)
    words = ["-m", model, "-t", str(threads), "-r", "3", "-o", "json"]
    words += (
        ["-p", "1024", "-n", "0"] if work == "prefill" else ["-p", "0", "-n", "128", "-d", "128"]
    )
    (row,) = json.loads(of([str(folder / "llama-bench"), *words], threads))
    return float(row["avg_ts"])


def _llama_server(folder: Path, model: str, threads: int) -> float:
    """Its fastest settings here: 8 slots, no unified cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores, t = ",".join(map(str, range(threads))), str(threads)
    words = ["-m", model, "--host", "127.0.0.1", "--port", str(port), "-t", t, "-tb", t]
    words += ["-np", "8", "-c", "10240", "-no-kvu", "-b", "2048", "-ub", "512", "-cram", "0"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["taskset", "-c", cores, str(folder / "llama-server"), *words]
    server = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
    try:
        url = f"http://127.0.0.1:{port}"
        _await(f"{url}/health", server)
        load = ["--url", url, "--concurrency", "32", "--requests", "32", *LENGTHS]
        return float(bench(threads, "x", *load, "--no-scrape")["output_tokens_per_s"])
    finally:
        server.terminate()
        server.wait()


def _await(url: str, server: Any) -> None:
    while server.poll() is None:
        try:
            with urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with {server.returncode}")


def openvino(python: str, model: str, work: str, threads: int) -> float:
    words = [python, str(OPENVINO), model, work, str(threads)]
    return float(json.loads(of(words, threads).splitlines()[-1])["tokens_per_s"])


def pairs(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def table(rows: list[dict[str, Any]]) -> None:
    """Medians, and infopt's over the fastest peer's."""
    cases = sorted({(row["work"], row["threads"], row["precision"]) for row in rows})
    for case in cases:
        found: dict[str, list[float]] = {}
        for row in rows:
            if (row["work"], row["threads"], row["precision"]) == case:
                found.setdefault(row["engine"], []).append(row["tokens_per_s"])
        medians = {engine: median(values) for engine, values in found.items()}
        peers = [value for engine, value in medians.items() if engine != "infopt"]
        ratio = medians["infopt"] / max(peers) if peers and "infopt" in medians else None
        said = ", ".join(
            f"{engine} {medians[engine]:,.1f} ({min(values):,.1f} … {max(values):,.1f})"
            for engine, values in found.items()
        )
        print(*case, said, "" if ratio is None else f"ratio {ratio:.2f}", sep=" | ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--infopt", nargs="+", default=["bf16=default"])
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--llama", nargs="*", default=[])
    parser.add_argument("--openvino")
    parser.add_argument("--openvino-models", nargs="*", default=[])
    parser.add_argument("--work", nargs="+", default=["decode", "prefill", "batch"])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for number in range(given.rounds):
        for threads in given.threads:
            for work in given.work:
                _turn(given, number, threads, work)
    table([json.loads(line) for line in given.output.open()])


def _turn(given: argparse.Namespace, number: int, threads: int, work: str) -> None:
    engines: dict[str, tuple[dict[str, str], Callable[[str], float]]] = {
        "infopt": (pairs(given.infopt), lambda model: infopt(model, work, threads)),
        "llama.cpp": (
            pairs(given.llama),
            lambda model: llama(given.llama_bin, model, work, threads),
        ),
        "openvino": (
            pairs(given.openvino_models),
            lambda model: openvino(given.openvino, model, work, threads),
        ),
    }
    precisions = dict.fromkeys(key for models, _ in engines.values() for key in models)
    for precision in precisions:
        for engine, (models, run) in engines.items():
            if precision in models:
                row = {
                    "engine": engine,
                    "precision": precision,
                    "work": work,
                    "threads": threads,
                    "round": number,
                    "tokens_per_s": run(models[precision]),
                    "load": os.getloadavg()[0],
                }
                print(row, flush=True)
                with given.output.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
