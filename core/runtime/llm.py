"""The engine from Python: prompts in, texts out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infopt.core.artifact.locate import locate
from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError, UsageError
from infopt.core.recipe.serve import EngineSettings, Pooling
from infopt.core.runtime.engine import Engine
from infopt.core.runtime.request import FinishReason, SamplingParams, StepOutput, TokenLogprob
from infopt.core.text.detokenize import Detokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a prompt; `text` ends before a stop string, `token_ids` after it."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    index: int = 0
    """Which of the answers to its prompt, where `n` were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the prompt's second token and those after it."""


_Key = tuple[str, int]
"""A request, and which of its answers."""


@dataclass(slots=True)
class _Answer:
    detokenizer: Detokenizer
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    embedding: tuple[float, ...] = ()

    def take(self, output: StepOutput) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or ()
        self.embedding = output.embedding or ()
        self.text += self.detokenizer.push(output.token_ids)
        self.reason = output.finish_reason
        if self.reason is not None:
            self.text += self.detokenizer.finish()
        if self.detokenizer.stopped_by is not None:
            self.reason = "stop"


class LLM:
    """An engine with its tokenizer.

    `model` is as on the command line: a directory, a .gguf file, a hub id, or None for the default.
    """

    def __init__(
        self, model: str | Artifact | None = None, settings: EngineSettings | None = None
    ) -> None:
        artifact = model if isinstance(model, Artifact) else locate(model)
        self.tokenizer: Any = artifact.text_tokenizer()
        self.engine = Engine.load(artifact, settings or EngineSettings())
        # Never used twice: an aborted request may still have something to say to a later call.
        self._ids = map(str, itertools.count())

    def generate(
        self, prompts: str | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Complete all prompts together, texts or lists of tokens, and return them in their order.

        The `n` answers to one prompt follow one another. Raises UsageError, before anything runs,
        for a prompt that does not fit, and EngineError where the model gave logits that are not
        finite.
        """
        params = params or SamplingParams()
        if params.pooling is not None:
            raise UsageError("pooling is for embed")
        answers = self._run(prompts, params)
        return [_completion(answer, index, params) for (_, index), answer in answers.items()]

    def embed(self, prompts: str | Sequence[Prompt], pooling: Pooling = "mean") -> Tensor:
        """Embed all prompts together: float32 [prompts, hidden], each of length 1.

        The hidden states of a prompt, after the last norm, are pooled into one. Raises as
        `generate` does.
        """
        answers = self._run(prompts, SamplingParams(pooling=pooling))
        return torch.tensor([answer.embedding for answer in answers.values()])

    def _run(self, prompts: str | Sequence[Prompt], params: SamplingParams) -> dict[_Key, _Answer]:
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = self._add([self._encode(prompt) for prompt in batch], params)
        try:
            while self.engine.has_work():
                for output in self.engine.step():
                    self._take(answers, output)
        finally:
            self._abort(answers)
        return answers

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            found: list[int] = self.tokenizer.encode(prompt)
            return found
        return list(prompt)

    def _add(self, prompts: list[list[int]], params: SamplingParams) -> dict[_Key, _Answer]:
        answers: dict[_Key, _Answer] = {}
        try:
            for prompt in prompts:
                name = next(self._ids)
                self.engine.add(name, prompt, params)
                for index in range(params.n):
                    detokenizer = Detokenizer(
                        self.tokenizer, stop=params.stop, min_tokens=params.min_tokens
                    )
                    answers[name, index] = _Answer(detokenizer, tuple(prompt))
        except Exception:
            self._abort(answers)
            raise
        return answers

    def _abort(self, answers: dict[_Key, _Answer]) -> None:
        for name, _ in answers:
            self.engine.abort(name)

    def _take(self, answers: dict[_Key, _Answer], output: StepOutput) -> None:
        key = (output.request_id, output.index)
        answer = answers.get(key)
        if answer is None or answer.reason is not None:
            return
        if output.finish_reason == "error":
            prompt = [name for name, index in answers if index == 0].index(output.request_id)
            raise EngineError(f"prompt {prompt}: {output.error}")
        if output.prompt_logprobs is not None:
            for (name, _), each in answers.items():
                if name == output.request_id:
                    each.prompt_logprobs = output.prompt_logprobs
        answer.take(output)
        if output.finish_reason is None and answer.reason is not None:
            self.engine.abort(*key)


def _completion(answer: _Answer, index: int, params: SamplingParams) -> Completion:
    assert answer.reason is not None
    return Completion(
        prompt_token_ids=answer.prompt,
        token_ids=tuple(answer.tokens),
        text=answer.text,
        finish_reason=answer.reason,
        logprobs=None if params.logprobs is None else tuple(answer.logprobs),
        index=index,
        prompt_logprobs=answer.prompt_logprobs,
    )
