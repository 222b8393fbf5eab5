"""What is asked of the engine, what it answers, and the state of a request in between."""

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from infopt.core.errors import UsageError
from infopt.core.recipe.serve import Pooling
from infopt.core.runtime.grammar import Constraint, Grammar

if TYPE_CHECKING:  # a server's API process starts without it
    import torch
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_BIAS = 100.0
MAX_BIASED = 1024
"""Tokens that one request may bias."""
REPETITION = (0.01, 10.0)
"""Beyond these, logits would leave what float32 holds."""
MAX_LENGTH_PENALTY = 10.0
_READ_BY_BEAMS = {
    *("max_tokens", "temperature", "stop_token_ids", "ignore_eos", "n", "priority", "cache_salt"),
    *("beam_width", "length_penalty", "early_stopping"),
}
_READ_BY_POOLING = {"pooling", "priority", "cache_salt"}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks for: how to choose its tokens, when, and what it shares.

    Raises UsageError for a value out of its range.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 set no limit; `max_tokens` None means up to
    the engine's longest sequence. Stop strings are for whoever turns tokens into text: the engine
    itself heeds only `stop_token_ids` and the model's end-of-sequence tokens.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divide the logit of each token seen in prompt or answer by this if it is above 0, else
    multiply it (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Take this from the logit of each token of the answer so far."""
    frequency_penalty: float = 0.0
    """Take this from the logit of each token once for every time it is in the answer so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what to add to its logit), from -100 (next to never) to 100 (next to always)."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """Nothing ends the answer before it has this many tokens."""
    grammar: Grammar | None = None
    """What the whole answer has to match; it ends where nothing can follow."""
    logprobs: int | None = None
    """Also give each token's log probability, and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens but the first, which are then all computed."""
    n: int = 1
    """Answers to draw from one prompt: the first as if it were alone, each next with `seed` + 1."""
    priority: int = 0
    """Lower numbers come first."""
    cache_salt: str = ""
    """Only requests with the same salt share what was computed for a beginning they share."""
    beam_width: int = 1
    """Search with so many beams and answer with the `n` best; at temperature 0, and all at once."""
    length_penalty: float = 1.0
    """Beams are judged by the sum of their log probabilities over their length to this power."""
    early_stopping: bool | Literal["never"] = False
    """Search no further with `beam_width` complete answers (True), or when the best beam is no
    better than they are (False), or cannot become better ("never")."""
    pooling: Pooling | None = None
    """Choose no token: answer with the prompt's embedding."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1 (got {self.max_tokens})")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 or more (got {self.temperature})")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 (no limit) or more (got {self.top_k})")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1 (got {self.top_p})")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be from 0 to 1 (got {self.min_p})")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2**63 - 1 (got {self.seed})")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise UsageError(f"{name} must be from 0 to {MAX_LOGPROBS} (got {count})")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise UsageError(f"n must be from 1 to {MAX_SAMPLES} (got {self.n})")
        if not -(2**31) <= self.priority < 2**31:
            raise UsageError(f"priority must be a 32-bit number (got {self.priority})")
        if isinstance(self.stop, str) or "" in self.stop:
            raise UsageError("stop must be a tuple of strings that are not empty")
        self._check_logits()
        self._check_beams()
        self._check_pooling()

    def _check_logits(self) -> None:
        """Raise UsageError for what would not change the logits as it should."""
        least, most = REPETITION
        if not least <= self.repetition_penalty <= most:
            raise UsageError(
                f"repetition_penalty must be from {least} to {most} (got {self.repetition_penalty})"
            )
        if len(self.logit_bias) > MAX_BIASED:
            raise UsageError(
                f"logit_bias is of {len(self.logit_bias)} tokens: {MAX_BIASED} at most"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2 <= value <= 2:
                raise UsageError(f"{name} must be from -2 to 2 (got {value})")
        for token, bias in self.logit_bias:
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                limits = f"from -{MAX_BIAS:g} to {MAX_BIAS:g}"
                raise UsageError(f"logit_bias must be {limits} (got {bias} for {token})")
        longest = math.inf if self.max_tokens is None else self.max_tokens
        if not 0 <= self.min_tokens <= longest:
            raise UsageError(f"min_tokens must be from 0 to max_tokens (got {self.min_tokens})")
        if self.grammar is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise UsageError(f"{name} contradicts a grammar, which says where the answer ends")

    def _check_beams(self) -> None:
        """Raise UsageError for what a search with beams, or one without, would not read."""
        if not 1 <= self.beam_width <= MAX_SAMPLES:
            raise UsageError(f"beam_width must be from 1 to {MAX_SAMPLES} (got {self.beam_width})")
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(
                f'early_stopping must be true, false or "never" ({self.early_stopping!r})'
            )
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            limits = f"from -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}"
            raise UsageError(f"length_penalty must be {limits} (got {self.length_penalty})")
        changed = self._changed()
        if self.beam_width == 1:
            unread = changed & {"length_penalty", "early_stopping"}
        else:
            unread = changed - _READ_BY_BEAMS
            if self.temperature != 0:
                raise UsageError("temperature must be 0 with beam_width: nothing is drawn")
            if self.n > self.beam_width:
                raise UsageError(f"n {self.n} is more than the {self.beam_width} of beam_width")
        if unread:
            without = "without" if self.beam_width == 1 else "with"
            raise UsageError(f"{min(unread)} does nothing {without} beam_width", "leave it out")

    def _check_pooling(self) -> None:
        """Raise UsageError for what a request that chooses no token would not read."""
        if self.pooling is None:
            return
        if self.pooling not in ("mean", "last"):
            raise UsageError(f"pooling must be mean or last (got {self.pooling!r})")
        if unread := self._changed() - _READ_BY_POOLING:
            raise UsageError(f"{min(unread)} does nothing with pooling", "leave it out")

    def _changed(self) -> set[str]:
        return {each.name for each in fields(self) if getattr(self, each.name) != each.default}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of a chosen token under the model, before temperature and truncation."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens and their log probabilities, best first."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request.

    A token that ends the request (end of sequence or a stop token) is not among `token_ids`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    """Which of the request's answers, where it asked for several."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """With the first output of the first answer, if they were asked for: the prompt is one."""
    embedding: tuple[float, ...] | None = None
    """[hidden], of length 1: the one thing that a request for it is answered with."""
    end: TokenLogprob | None = None
    """The token that ended it, if log probabilities were asked for."""
    refused: bool = False
    """Whether the error is the request's own: what it asks for cannot be answered."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A request waits no longer: it has joined those that run."""

    request_id: str
    waited_s: float
    cached_tokens: int
    """Of its prompt, found computed already."""


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way: the tokens known so far, and how many of them are in the cache."""

    request_id: str
    params: SamplingParams
    tokens: list[int]
    """The prompt, then what was generated."""
    max_length: int
    """The request is over when it has this many tokens."""
    generator: "torch.Generator"
    """Its own, so that its draws do not depend on the requests beside it."""
    prompt_length: int = 0
    """The first tokens, that were given."""
    ends: frozenset[int] = frozenset()
    """The tokens that end its answer."""
    constraint: Constraint | None = None
    """Its place in its grammar."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's second token and those after it, as far as they are known."""
    pooled: int = 0
    """First tokens of the prompt whose hidden states are in `pool`."""
    pool: "Tensor | None" = None
    """float64 [hidden]: their sum."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    index: int = 0
    """Which of the answers to one prompt this is."""
    order: tuple[int, int, int] = (0, 0, 0)
    """Priority, arrival, index: whose turn it is; the scheduler sets it."""
    arrived: float = 0.0
    """When, by the scheduler's clock."""
    joined: bool = False
    """Whether it has ever run: what was preempted may come back into its batch."""
    forks: int = 0
    """Further answers that are to come from it once its prompt is computed."""
    digests: list[bytes] = field(default_factory=list)
    """The names of its first full blocks, as far as they were ever asked for."""
    published: int = 0
    """Its first blocks that others may find."""

    def fork(self, index: int) -> "Request":
        """A request that goes on from the same tokens, drawing as if it had an `index` later seed.

        The scheduler's part of it is for `Scheduler.fork`.
        """
        seed = (self.generator.initial_seed() + index) % 2**63
        return Request(
            request_id=self.request_id,
            params=self.params,
            tokens=list(self.tokens),
            max_length=self.max_length,
            generator=type(self.generator)().manual_seed(seed),
            prompt_length=self.prompt_length,
            ends=self.ends,
            constraint=None if self.constraint is None else self.constraint.copy(),
            prompt_logprobs=self.prompt_logprobs,
            index=index,
        )

    @property
    def unread(self) -> range:
        """Positions of the prompt whose hidden states are still wanted, for more than the next
        token: for the likelihood of the token behind them, or for the embedding."""
        params = self.params
        if params.pooling is not None:
            first = self.pooled if params.pooling == "mean" else self.prompt_length - 1
            return range(first, self.prompt_length)
        if params.prompt_logprobs is None:
            return range(0)
        return range(len(self.prompt_logprobs), self.prompt_length - 1)

    @property
    def reusable(self) -> int:
        """First tokens that others may have computed: the hidden states of the rest are wanted."""
        unread = self.unread
        return unread.start if unread else len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """Known tokens still to be computed: between steps at least one, or none where a beam waits
        for others."""
        return len(self.tokens) - self.computed
