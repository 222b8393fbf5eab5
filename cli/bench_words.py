"""The words and options of `infopt bench`'s load."""

from enum import StrEnum
from typing import Annotated

import typer


class ArrivalWord(StrEnum):
    constant = "constant"
    poisson = "poisson"
    gamma = "gamma"


class WorkloadWord(StrEnum):
    synthetic = "synthetic"
    shared_prefix = "shared-prefix"
    multi_turn = "multi-turn"
    file = "file"
    rag = "rag"
    json = "json"
    tools = "tools"


class EndpointWord(StrEnum):
    completions = "completions"
    chat = "chat"


class BenchEngineWord(StrEnum):
    infopt = "infopt"
    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    transformers = "transformers"


Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="Any OpenAI-compatible server; MODEL is then the name it is asked for."
    ),
]
Engine = Annotated[
    BenchEngineWord | None,
    typer.Option(
        "--engine",
        help="Start this one's server for the run; without it the engine runs in this process.",
        show_default="none",
    ),
]
EndpointOption = Annotated[
    EndpointWord | None,
    typer.Option(
        "--endpoint",
        help="Which the server is asked at.",
        show_default="completions, or chat for workloads that need it",
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        help="Environment variable with the server's API key.",
        show_default="INFOPT_API_KEY, if it is set",
        metavar="NAME",
    ),
]
Scrape = Annotated[
    bool | None,
    typer.Option(
        "--scrape/--no-scrape",
        help="Read the server's /metrics beside the load.",
        show_default="where it has them",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests", help="Requests counted, of each level.", show_default="16; of a probe 64"
    ),
]
Duration = Annotated[
    float | None,
    typer.Option(
        "--duration",
        help="Begin requests for so long, in place of a number of them.",
        metavar="SECONDS",
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option("--concurrency", help="Closed loop: requests in flight.", show_default="4"),
]
RequestRate = Annotated[
    float | None,
    typer.Option(
        "--request-rate",
        help="Open loop: requests begun a second; latencies count from when each was due. "
        "With --find-capacity: where to start.",
        metavar="PER_SECOND",
    ),
]
Arrival = Annotated[
    ArrivalWord | None,
    typer.Option("--arrival", help="How they come.", show_default="poisson"),
]
Burstiness = Annotated[
    float | None,
    typer.Option(
        "--burstiness", help="Of gamma arrivals: below 1 bursts, 1 is Poisson, above it evener."
    ),
]
MaxConcurrency = Annotated[
    int | None,
    typer.Option(
        "--max-concurrency",
        help="Open loop: at most so many in flight; the wait of the others counts.",
        show_default="any",
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        help="Replay JSON lines of timestamp (ms), input_length, output_length.",
        metavar="FILE",
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option("--speedup", help="Replay the trace so much faster.", show_default="1"),
]
Sweep = Annotated[
    str | None,
    typer.Option(
        "--sweep", help="Levels: concurrency=1,2,4 or request-rate=1,2,4.", metavar="KEY=VALUES"
    ),
]
FindCapacity = Annotated[
    bool | None,
    typer.Option(
        "--find-capacity",
        help="Find the highest request rate that keeps --slo.",
        show_default="no",
    ),
]
SloOption = Annotated[
    str | None,
    typer.Option(
        "--slo",
        help="Limits on each request: ttft=200ms,tpot=100ms,ttfot=1s,e2e=5s, or mlperf:NAME "
        "such as mlperf:llama3.1-8b.",
        metavar="LIMITS",
    ),
]
Attainment = Annotated[
    float | None,
    typer.Option(
        "--attainment",
        help="Share of requests, failed ones among them, that must keep it.",
        show_default="0.9",
    ),
]
WorkloadOption = Annotated[
    WorkloadWord | None,
    typer.Option("--workload", help="What is asked.", show_default="synthetic"),
]
PromptTokens = Annotated[
    str | None,
    typer.Option(
        "--prompt-tokens",
        help="Tokens per prompt, or a range LOW-HIGH.",
        show_default="128; rag 2048",
        metavar="N",
    ),
]
OutputTokens = Annotated[
    str | None,
    typer.Option(
        "--output-tokens",
        help="Tokens per answer, or a range LOW-HIGH.",
        show_default="32; rag, tools 64",
        metavar="N",
    ),
]
PrefixTokens = Annotated[
    int | None,
    typer.Option(
        "--prefix-tokens", help="shared-prefix: tokens before each prompt.", show_default="512"
    ),
]
Prefixes = Annotated[
    int | None,
    typer.Option("--prefixes", help="shared-prefix: how many different ones.", show_default="1"),
]
Turns = Annotated[
    int | None, typer.Option("--turns", help="multi-turn: of a conversation.", show_default="3")
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="file: JSON or JSON lines of prompt, messages or ShareGPT's conversations.",
        metavar="FILE",
    ),
]
PricePerHour = Annotated[
    float | None,
    typer.Option("--price-per-hour", help="Of the machine: cost per million output tokens."),
]
MaxFailed = Annotated[
    float | None,
    typer.Option(
        "--max-failed",
        help="Share of requests that may fail before the run is invalid.",
        show_default="0.05",
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option("--warmup", help="Requests sent first and not counted.", show_default="1"),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", help="Seconds after which a request has failed.", show_default="600"),
]
