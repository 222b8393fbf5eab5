"""The engine from Python: prompts in, texts out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infopt.core.artifact.locate import locate
from infopt.core.artifact.read import Artifact
from infopt.core.errors import EngineError
from infopt.core.recipe.serve import EngineSettings
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


@dataclass(slots=True)
class _Answer:
    detokenizer: Detokenizer
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: StepOutput) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or ()
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
        self.tokenizer: Any = artifact.tokenizer()
        self.engine = Engine.load(artifact, settings or EngineSettings())
        # Never used twice: an aborted request may still have something to say to a later call.
        self._ids = map(str, itertools.count())

    def generate(
        self, prompts: str | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Complete all prompts together, texts or lists of tokens, and return them in their order.

        Raises UsageError, before anything runs, for a prompt that does not fit, and EngineError
        where the model gave logits that are not finite.
        """
        params = params or SamplingParams()
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = self._add([self._encode(prompt) for prompt in batch], params)
        try:
            while self.engine.has_work():
                for output in self.engine.step():
                    self._take(answers, output)
        finally:
            for name in answers:
                self.engine.abort(name)
        return [_completion(answer, params) for answer in answers.values()]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            found: list[int] = self.tokenizer.encode(prompt)
            return found
        return list(prompt)

    def _add(self, prompts: list[list[int]], params: SamplingParams) -> dict[str, _Answer]:
        answers: dict[str, _Answer] = {}
        try:
            for prompt in prompts:
                name = next(self._ids)
                self.engine.add(name, prompt, params)
                detokenizer = Detokenizer(self.tokenizer, stop=params.stop)
                answers[name] = _Answer(detokenizer, tuple(prompt))
        except Exception:
            for name in answers:
                self.engine.abort(name)
            raise
        return answers

    def _take(self, answers: dict[str, _Answer], output: StepOutput) -> None:
        answer = answers.get(output.request_id)
        if answer is None or answer.reason is not None:
            return
        if output.finish_reason == "error":
            raise EngineError(f"prompt {list(answers).index(output.request_id)}: {output.error}")
        answer.take(output)
        if output.finish_reason is None and answer.reason is not None:
            self.engine.abort(output.request_id)


def _completion(answer: _Answer, params: SamplingParams) -> Completion:
    assert answer.reason is not None
    logprobs = None if params.logprobs is None else tuple(answer.logprobs)
    return Completion(answer.prompt, tuple(answer.tokens), answer.text, answer.reason, logprobs)
