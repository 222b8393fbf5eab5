"""The options that commands share, each said once."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DeviceWord(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class EngineWord(StrEnum):
    """Whose server `infopt serve` starts."""

    infopt = "infopt"
    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    transformers = "transformers"


class BatchingWord(StrEnum):
    static = "static"
    dynamic = "dynamic"
    continuous = "continuous"


class ToolParserWord(StrEnum):
    auto = "auto"
    hermes = "hermes"
    llama3_json = "llama3-json"
    mistral = "mistral"
    none = "none"


class PoolingWord(StrEnum):
    mean = "mean"
    last = "last"


class KvDTypeWord(StrEnum):
    auto = "auto"
    int8 = "int8"
    fp8 = "fp8"


class KernelsWord(StrEnum):
    auto = "auto"
    native = "native"
    torch = "torch"


class ActivationsWord(StrEnum):
    auto = "auto"
    int8 = "int8"


class DTypeWord(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model directory, a .gguf file, a hub id (owner/name), or 'default'. "
        "Without it: the embedded default model.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE", help="Take settings from a recipe; options override it."
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")
]
ReportOutput = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Keep the report there, as report.json."),
]
DeviceOption = Annotated[
    DeviceWord | None, typer.Option("--device", help="Where to compute.", show_default="auto")
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda; with --static also a device by its name, such as 'H100 SXM'.",
        show_default="auto",
    ),
]
DTypeOption = Annotated[
    DTypeWord | None,
    typer.Option(
        "--dtype",
        help="Compute in this type; auto is float32 on a CPU without bfloat16 instructions.",
        show_default="auto",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of all that is random.", show_default="0")
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE|-", help="Write the report as JSON; '-' is standard output."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no summary.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Replace existing output without asking.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done, the memory and the time; do nothing."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Allow a model directory that brings its own code."),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="Calibration text: default, shakespeare, a .txt or .jsonl file, "
        "or hub:NAME[/CONFIG]:SPLIT:COLUMN.",
        show_default="default",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", help="Calibration windows.", show_default="128")
]
SequenceLength = Annotated[
    int | None,
    typer.Option("--sequence-length", help="Tokens per calibration window.", show_default="512"),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put the calibration text through the chat template.",
        show_default="no-chat",
    ),
]

ToolParser = Annotated[
    ToolParserWord | None,
    typer.Option(
        "--tool-parser",
        help="The form in which the model writes calls of tools; auto: what its template says.",
        show_default="auto",
    ),
]
Pooling = Annotated[
    PoolingWord | None,
    typer.Option(
        "--pooling",
        help="Of hidden states into embeddings, where a client does not say.",
        show_default="mean",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", help="Token slots per KV block.", show_default="16"),
]
KvBlocks = Annotated[
    int | None,
    typer.Option("--kv-blocks", help="Blocks in the KV pool.", show_default="what fits"),
]
KvDType = Annotated[
    KvDTypeWord | None,
    typer.Option(
        "--kv-dtype",
        help="Of cached keys and values; auto: what the artifact says, else the type of the run.",
        show_default="auto",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Of a CPU's products.", show_default="one for each core", metavar="N"
    ),
]
Kernels = Annotated[
    KernelsWord | None,
    typer.Option(
        "--kernels",
        help="Whose products a CPU computes; auto: what INFOPT_KERNELS says, else the faster.",
        show_default="auto",
    ),
]
Activations = Annotated[
    ActivationsWord | None,
    typer.Option(
        "--activations",
        help="Of a CPU's products with 4-bit weights; int8: rounded, an approximation.",
        show_default="auto",
    ),
]
RepackCache = Annotated[
    bool | None,
    typer.Option(
        "--repack-cache/--no-repack-cache",
        help="Keep weights beside the model as native kernels read them, for the next start.",
        show_default="repack-cache",
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="A request's tokens depend, by no bit, on what runs along; slower.",
        show_default="no-deterministic",
    ),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option("--max-batch-tokens", help="Tokens computed in one step.", show_default="512"),
]
MaxChunkTokens = Annotated[
    int | None,
    typer.Option(
        "--max-chunk-tokens",
        help="Of these, tokens of one prompt.",
        show_default="what running requests leave",
    ),
]
MaxRunning = Annotated[
    int | None, typer.Option("--max-running", help="Requests in one step.", show_default="32")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Longest prompt plus output.", show_default="the model's"),
]
Batching = Annotated[
    BatchingWord | None,
    typer.Option(
        "--batching",
        help="When requests join: once the batch before has ended (static); the same, once the "
        "batch is full or has waited (dynamic); at any step (continuous).",
        show_default="continuous",
    ),
]
BatchWaitMs = Annotated[
    float | None,
    typer.Option(
        "--batch-wait-ms",
        help="How long a dynamic batch waits to be full.",
        show_default="50",
    ),
]
Watermark = Annotated[
    float | None,
    typer.Option(
        "--watermark",
        help="Share of the KV blocks left free when a request joins others.",
        show_default="0.01",
    ),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Compute a beginning that requests have in common once.",
        show_default="prefix-caching",
    ),
]
PrefixHostBytes = Annotated[
    int | None,
    typer.Option(
        "--prefix-host-bytes",
        help="Host memory for prefixes that the KV pool gave up.",
        show_default="0",
    ),
]
PrefixDisk = Annotated[
    str | None,
    typer.Option(
        "--prefix-disk",
        metavar="DIR",
        help="A folder for prefixes that pool and host memory gave up; it outlives the server.",
        show_default="none",
    ),
]
PrefixDiskBytes = Annotated[
    int | None,
    typer.Option(
        "--prefix-disk-bytes",
        help="What that folder may hold.",
        show_default="4 GiB",
    ),
]


@dataclass(frozen=True)
class Common:
    """What every command can be told."""

    recipe: Path | None = None
    output: Path | None = None
    device: str | None = None
    dtype: DTypeWord | None = None
    seed: int | None = None
    json: str | None = None
    quiet: bool = False
    yes: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False
