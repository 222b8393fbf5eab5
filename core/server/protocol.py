"""OpenAI's requests as far as they work here; what does not is refused by name, never ignored."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from infopt.core.errors import UsageError
from infopt.core.runtime.grammar import Grammar
from infopt.core.runtime.request import (
    MAX_BIAS,
    MAX_BIASED,
    MAX_LENGTH_PENALTY,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    REPETITION,
    SamplingParams,
)
from infopt.core.server.faults import ApiError
from infopt.core.server.structured import ResponseFormat, StructuredOutputs, refused

# What OpenAI does where a client is silent.
COMPLETION_TOKENS = 16
TEMPERATURE = 1.0
TOP_P = 1.0

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]
# JSON has strings alone for keys.
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=False)]
Bias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]], Field(max_length=MAX_BIASED)
]
MAX_ANSWERS = 2048
"""Of one body: prompts times n."""


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


MAX_STOPS = 16
MAX_STOP_LENGTH = 256
"""Characters: what may be the beginning of one is held back, and looked at with each token."""
MAX_STOP_TOKENS = 1024
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_strings),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's extension: the usage so far in every chunk."""


class Given(BaseModel):
    """What every body has in common: no field is unknown, none is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # OpenAI's fields that do nothing here: accepted with the values that ask for nothing.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Labels for OpenAI's own books: accepted, whatever they say.
    METADATA: ClassVar[frozenset[str]] = frozenset({"user"})

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            if not is_text([key, value]):
                raise PydanticCustomError(
                    "unsupported_value",
                    "{key} holds half a character: a surrogate without its pair",
                    {"key": key if is_text(key) else ascii(key)},
                )
            if key in cls.NEUTRAL:
                if not any(_same(value, neutral) for neutral in cls.NEUTRAL[key]):
                    raise PydanticCustomError(
                        "unsupported_value",
                        "{key} is not supported here with the value {value}",
                        {"key": key, "value": repr(value)[:80]},
                    )
            elif key not in cls.METADATA:
                kept[key] = value
        return kept


class Body(Given):
    """What both kinds of completion take."""

    NEUTRAL = {"store": (None, False), "service_tier": (None, "auto", "default")}
    METADATA = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The same by its newer name, which clients send to either endpoint."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop = []
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias | None = None
    response_format: ResponseFormat | None = None
    # Extensions that vLLM has under the same names.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    """0 and -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=REPETITION[0], le=REPETITION[1])] = 1.0
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)] = []
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool = False
    """The `n` best answers that a search with so many beams finds."""
    length_penalty: Annotated[float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)] = 1.0
    priority: Priority = 0
    """Lower numbers come first."""
    cache_salt: str = ""
    """What was computed for a beginning is shared only with requests of the same salt."""
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_limit(self) -> "Body":
        if len({self.max_tokens, self.max_completion_tokens} - {None}) == 2:
            raise refused("max_tokens", "contradicts max_completion_tokens")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """The limit, by whichever name it was given."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "needs stream: true")
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> "Body":
        if self.response_format is not None and self.structured_outputs is not None:
            raise refused("structured_outputs", "contradicts response_format")
        try:
            self.asked_grammar()
        except UsageError as error:
            asked = "structured_outputs" if self.response_format is None else "response_format"
            raise refused(asked, f"does not work: {error.message}") from None
        return self

    @model_validator(mode="after")
    def _beams_are_read(self) -> "Body":
        if self.use_beam_search and self.stop:
            raise refused("stop", "does nothing with use_beam_search")
        if self.use_beam_search and (self.n or 1) < 2:
            raise refused("use_beam_search", "searches with n beams: it needs n of 2 or more")
        if self.length_penalty != 1 and not self.use_beam_search:
            raise refused("length_penalty", "does nothing without use_beam_search")
        return self

    def asked_grammar(self) -> Grammar | None:
        """What the answers have to match; UsageError for what is too long or too deep."""
        asked = self.response_format or self.structured_outputs
        return None if asked is None else asked.grammar()

    def sampling(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """As the engine takes it; stop strings stay above the engine.

        Raises UsageError for what does not go together.
        """
        silent = 0.0 if self.use_beam_search else TEMPERATURE
        n = self.n or 1
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=silent if self.temperature is None else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=TOP_P if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % 2**63,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            min_tokens=self.min_tokens,
            grammar=grammar or self.asked_grammar(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=n,
            beam_width=n if self.use_beam_search else 1,
            length_penalty=self.length_penalty,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


class CompletionRequest(Body):
    """POST /v1/completions."""

    NEUTRAL = {**Body.NEUTRAL, "best_of": (None, 1), "suffix": (None, "")}

    prompt: str | list[str] | TokenIds | list[TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def params(self, max_tokens: int) -> SamplingParams:
        """With `echo`, log probabilities are of the prompt as well."""
        return self.sampling(max_tokens, self.logprobs, self.logprobs if self.echo else None)


def is_text(value: Any) -> bool:
    """Whether every string in a JSON value can be written as UTF-8; \\ud800 alone cannot."""
    todo = [value]
    while todo:
        match todo.pop():
            case str() as text:
                try:
                    text.encode()
                except UnicodeEncodeError:
                    return False
            case list() as items:
                todo += items
            case dict() as table:
                todo += [*table, *table.values()]
    return True


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not merely as 1 equals True."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def check_count(prompts: int, body: Body) -> None:
    """Raise ApiError for a body that asks for too many answers."""
    if (count := prompts * (body.n or 1)) > MAX_ANSWERS:
        raise ApiError(
            400,
            f"{count} answers in one request: at most {MAX_ANSWERS}, prompts times n",
            param="prompt",
            code="invalid_value",
        )


def invalid(fault: ErrorDetails) -> ApiError:
    """The first fault of a body as a 400 that names the field."""
    path = [str(part) for part in fault["loc"] if part != "body"]
    key = fault.get("ctx", {}).get("key")
    match fault["type"]:
        case "json_invalid":
            return ApiError(400, "the body is not JSON", code="invalid_json")
        case "extra_forbidden":
            param = ".".join(path)
            return ApiError(400, f"unknown field {param!r}", param=param, code="unknown_field")
        case "missing" if path:
            param = ".".join(path)
            return ApiError(400, f"{param!r} is required", param=param, code="missing_field")
        case "missing" | "model_attributes_type" | "dict_type" if not path:
            return ApiError(400, "the body must be a JSON object", code="invalid_json")
        case "unsupported_value":
            return ApiError(400, fault["msg"], param=key, code="unsupported_value")
    param = _field(path)
    return ApiError(400, f"{param}: {fault['msg']}", param=param, code="invalid_value")


def _field(path: list[str]) -> str:
    """The field's path without pydantic's names of the branches of a union, such as `list[str]`."""
    kept = [p for p in path if p.isdigit() or (p.isidentifier() and p not in _BRANCHES)]
    return ".".join(kept)


_BRANCHES = {"str", "int", "float", "bool", "constrained", "TextPart", "NamedTool"}
