"""Mixed traffic against a real server for as long as asked: what leaks, what fails, what grows.

    python docs/results/serving_soak.py --minutes 30 [--model DIR] [--concurrency 8]

Streams, whole answers, several answers, stop strings, embeddings, grammars, bad bodies, clients
that leave, and metrics, by chance. In the end: blocks still in use, answers of 5xx, and the slope
of resident memory of both processes over the second half.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil


def leave_early(url: str, body: dict[str, Any], after: float) -> int:
    """Send a request and go away before its answer is whole."""
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with socket.create_connection((parts.hostname, parts.port)) as gone:
        gone.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(after)
    return 499


def one_request(client: httpx.Client, url: str, chance: random.Random) -> int:
    """Any of the kinds, and its status."""
    words = " ".join(chance.choices(["the", "sea", "of", "stars", "and", "ships"], k=40))
    body: dict[str, Any] = {"prompt": words[: chance.randrange(4, 200)], "max_tokens": 16}
    match chance.randrange(9):
        case 0:
            long = {**body, "max_tokens": 200, "ignore_eos": True, "stream": True}
            return leave_early(url, long, chance.random() / 2)
        case 1:
            return client.post("/v1/completions", json={**body, "top_p": 9}).status_code
        case 2:
            return client.post("/v1/completions", json={**body, "n": 3}).status_code
        case 3:
            return client.post("/v1/embeddings", json={"input": words}).status_code
        case 4:
            stopped = {**body, "stream": True, "stop": ["e", "."]}
            return client.post("/v1/completions", json=stopped).status_code
        case 5:
            choice = {**body, "structured_outputs": {"choice": ["yes", "no"]}}
            return client.post("/v1/completions", json=choice).status_code
        case 6:
            return client.get("/metrics").status_code
    chat = {"messages": [{"role": "user", "content": words}], "max_tokens": 16}
    return client.post("/v1/chat/completions", json=chat).status_code


def resident(process: psutil.Process) -> int:
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", default="default")
    parser.add_argument("--concurrency", type=int, default=8)
    given = parser.parse_args()
    infopt = Path(sys.executable).parent / "infopt"
    with tempfile.NamedTemporaryFile("w+") as log:
        # A small pool is filled early, and what it holds is no growth.
        words = [infopt, "serve", given.model, "--port", "0", "--kv-blocks", "192"]
        server = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)
        try:
            soak(psutil.Process(server.pid), url_of(Path(log.name)), given)
        finally:
            server.terminate()
            server.wait(60)


def url_of(log: Path) -> str:
    for _ in range(1200):
        for line in log.read_text().splitlines():
            if "listening on " in line:
                return line.split("listening on ")[1].split()[0]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start: {log.read_text()[-500:]}")


def soak(process: psutil.Process, url: str, given: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * given.minutes
    codes: Counter[int] = Counter()
    sizes: list[tuple[float, int]] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=url, timeout=120) as client:
            while time.monotonic() < end:
                codes[one_request(client, url, chance)] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(given.concurrency)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        sizes.append((time.monotonic(), resident(process)))
        time.sleep(1)
    time.sleep(2)
    stats = httpx.get(f"{url}/health", timeout=30).json()["engine"]
    later = sizes[len(sizes) // 2 :]
    slope = linear_regression([at for at, _ in later], [size for _, size in later]).slope
    told = {
        "requests": sum(codes.values()),
        "codes": dict(sorted(codes.items())),
        "answers_5xx": sum(count for code, count in codes.items() if code >= 500),
        "blocks_used": stats["blocks_used"],
        "running": stats["running"],
        "preemptions": stats["preemptions"],
        "resident_mb": [round(sizes[0][1] / 1e6), round(sizes[-1][1] / 1e6)],
        "resident_mb_per_minute": round(slope * 60 / 1e6, 3),
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
