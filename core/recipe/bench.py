"""Settings of `infopt bench`."""

from collections.abc import Mapping
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from infopt.core.recipe.load import Range, Tokens, parse_sweep, parse_tokens
from infopt.core.recipe.serve import EngineSettings
from infopt.core.recipe.slo import parse_slo

Arrival = Literal["constant", "poisson", "gamma"]
Workload = Literal["synthetic", "shared-prefix", "multi-turn", "file", "rag", "json", "tools"]
Endpoint = Literal["completions", "chat"]
BenchEngine = Literal["infopt", "vllm", "sglang", "llama.cpp", "transformers"]
API_KEY_VARIABLE = "INFOPT_API_KEY"
CHAT_ONLY: frozenset[Workload] = frozenset({"multi-turn", "json", "tools"})
"""Workloads that a completion cannot express."""
REQUESTS, REQUESTS_OF_A_PROBE, CONCURRENCY = 16, 64, 4
ATTAINMENT = 0.9
_LENGTHS: Mapping[Workload, tuple[int, int]] = {"rag": (2048, 64), "tools": (128, 64)}
_USUAL = (128, 32)
# What only one workload reads.
_OWN: Mapping[str, Workload] = {
    "prefix_tokens": "shared-prefix",
    "prefixes": "shared-prefix",
    "turns": "multi-turn",
    "dataset": "file",
}


class BenchSettings(EngineSettings):
    """The load: who is asked, how often, for what."""

    url: str | None = None
    """An OpenAI-compatible server (its base URL); default: the engine, in this process."""
    engine: BenchEngine | None = None
    """Whose server is started for the run; default: none, the engine in this process."""
    endpoint: Endpoint | None = None
    """Which of the server's; default: completions, or chat where the workload needs it."""
    api_key_env: str | None = None
    """The environment variable with the server's key; default: INFOPT_API_KEY, if it is set."""
    scrape: bool | None = None
    """Read the server's /metrics beside the load; default: where it has them."""

    requests: int | None = Field(default=None, ge=1)
    """Requests counted, of each level; default: 16, and 64 of a probe for the capacity."""
    duration: float | None = Field(default=None, gt=0)
    """Seconds in which requests are begun, in place of a number of them."""
    concurrency: int | None = Field(default=None, ge=1)
    """Closed loop: requests in flight; default: 4."""
    request_rate: float | None = Field(default=None, gt=0)
    """Open loop: requests begun a second, whatever becomes of those before."""
    arrival: Arrival | None = None
    """Of an open loop; default: poisson."""
    burstiness: float | None = Field(default=None, gt=0)
    """The shape of gamma arrivals: below 1 they come in bursts, 1 is Poisson's, above it evener."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Of an open loop: others wait here, and that wait counts."""
    trace: str | None = None
    """JSON lines of timestamp (ms), input_length and output_length, sent at those times."""
    speedup: float | None = Field(default=None, gt=0)
    """The trace's times are divided by it; default: 1."""
    sweep: str | None = None
    """Levels, one after the other: `concurrency=1,2,4` or `request-rate=1,2,4`."""
    find_capacity: bool = False
    """Find the highest request rate at which the attainment is reached."""
    slo: str | None = None
    """Limits: `ttft=200ms,tpot=100ms,e2e=5s`, or `mlperf:NAME`."""
    attainment: float | None = Field(default=None, gt=0, le=1)
    """Share of all requests, failed ones among them, that must keep the limits; default: 0.9."""

    workload: Workload = "synthetic"
    prompt_tokens: Tokens | None = None
    """A number or a range LOW-HIGH; default: 128, rag 2048."""
    output_tokens: Tokens | None = None
    """A number or a range LOW-HIGH; default: 32, rag 64."""
    prefix_tokens: int | None = Field(default=None, ge=1)
    """Of a shared prefix, before each prompt's own tokens; default: 512."""
    prefixes: int | None = Field(default=None, ge=1)
    """How many different ones; default: 1."""
    turns: int | None = Field(default=None, ge=2)
    """Of a conversation; default: 3."""
    dataset: str | None = None
    """A file of prompts or conversations, JSON or JSON lines."""

    price_per_hour: float | None = Field(default=None, gt=0)
    """Of the machine, in any currency."""
    max_failed: float = Field(default=0.05, ge=0, lt=1)
    """Share of requests that may fail before the run is invalid."""
    warmup: int = Field(default=1, ge=0)
    """Requests sent first and not counted."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds after which one request counts as failed."""

    @field_validator("slo")
    @classmethod
    def _limits_are_limits(cls, value: str | None) -> str | None:
        if value is not None:
            parse_slo(value)
        return value

    @field_validator("sweep")
    @classmethod
    def _levels_are_levels(cls, value: str | None) -> str | None:
        if value is not None:
            parse_sweep(value)
        return value

    @model_validator(mode="after")
    def _one_load(self) -> "BenchSettings":
        if self.request_rate is not None and self.concurrency is not None:
            raise ValueError(
                "concurrency is of a closed loop, request_rate of an open one: "
                "say max_concurrency to bound an open loop"
            )
        given = [key for key in ("trace", "sweep") if getattr(self, key) is not None]
        given += ["find_capacity"] if self.find_capacity else []
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two loads: choose one")
        if given and self.concurrency is not None:
            raise ValueError(f"concurrency is not read with {given[0]}")
        if given and given[0] != "find_capacity" and self.request_rate is not None:
            raise ValueError(f"request_rate is not read with {given[0]}")
        if self.requests is not None and self.duration is not None:
            raise ValueError("requests and duration are two ends: choose one")
        if self.find_capacity and self.slo is None:
            raise ValueError("find_capacity needs slo: which limits are to be kept?")
        if self.attainment is not None and self.slo is None:
            raise ValueError("attainment needs slo")
        if self.url is not None and self.engine is not None:
            raise ValueError("url and engine are two targets: choose one")
        return self

    @model_validator(mode="after")
    def _is_used(self) -> "BenchSettings":
        """An option that nothing would read is refused."""
        rated = self.is_open and self.trace is None
        if self.arrival is not None and not rated:
            raise ValueError("arrival is of an open loop: say request_rate")
        if (self.burstiness is not None) != (self.arrival == "gamma"):
            raise ValueError("burstiness and arrival: gamma go together")
        if self.max_concurrency is not None and not self.is_open:
            raise ValueError("max_concurrency bounds an open loop: say request_rate or trace")
        if self.speedup is not None and self.trace is None:
            raise ValueError("speedup is of a trace")
        for key, workload in _OWN.items():
            if getattr(self, key) is not None and self.workload != workload:
                raise ValueError(f"{key} is for workload: {workload}")
        if self.workload == "file" and self.dataset is None:
            raise ValueError("workload: file needs dataset")
        if self.trace is not None:
            for key in ("prompt_tokens", "output_tokens"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is not read with trace, which has its own lengths")
            if self.workload != "synthetic":
                raise ValueError(f"a trace has its own lengths, workload: {self.workload} too")
        if self.workload == "file" and self.prompt_tokens is not None:
            raise ValueError("prompt_tokens is not read with workload: file")
        if self.endpoint == "completions" and self.workload in CHAT_ONLY:
            raise ValueError(f"workload: {self.workload} goes through chat, not completions")
        return self

    @property
    def is_open(self) -> bool:
        """Whether requests begin by the clock, not when others end."""
        rated = self.sweep is not None and parse_sweep(self.sweep)[0] == "request-rate"
        rated = rated or self.request_rate is not None
        return rated or self.trace is not None or self.find_capacity

    @property
    def chat(self) -> bool:
        """Whether requests go to /v1/chat/completions."""
        if self.endpoint is not None:
            return self.endpoint == "chat"
        return self.workload in CHAT_ONLY or self.workload == "file"

    @property
    def limits(self) -> dict[str, float]:
        """Of latencies, in seconds; empty where none is set."""
        return {} if self.slo is None else parse_slo(self.slo)

    @property
    def target_attainment(self) -> float:
        return ATTAINMENT if self.attainment is None else self.attainment

    @property
    def prompt_range(self) -> Range:
        default = _LENGTHS.get(self.workload, _USUAL)[0]
        return parse_tokens(default if self.prompt_tokens is None else self.prompt_tokens)

    @property
    def output_range(self) -> Range:
        default = _LENGTHS.get(self.workload, _USUAL)[1]
        return parse_tokens(default if self.output_tokens is None else self.output_tokens)

    @property
    def needs_server(self) -> str | None:
        """The key that the engine in this process cannot serve, if one was asked for."""
        if self.chat:
            return f"workload: {self.workload}" if self.endpoint is None else "endpoint: chat"
        if self.endpoint is not None or self.workload == "file":
            return "endpoint" if self.endpoint is not None else "workload: file"
        if self.scrape is not None:
            return "scrape"
        return "api_key_env" if self.api_key_env is not None else None


WORKLOADS: tuple[Workload, ...] = get_args(Workload)
