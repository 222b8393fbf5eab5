"""lm-eval's local-completions sees the scores that the engine gives in process."""

from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.llm import LLM
from infopt.core.runtime.request import SamplingParams

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'infopt[eval]'")
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Berlin"),
    ("Two plus two equals", " four."),  # the model ends there: lm-eval counts on that token
    ("The sea is", "\n\nblue and deep, and the stars are"),
    ("def add(a, b):\n", "    return a + b"),
    ("", "Once upon a time there was a king"),
]


def test_loglikelihoods_are_those_in_process(server: Any, tiny_model: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(tiny_model),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        batch_size=4,
        max_length=512,
    )
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    told = served.loglikelihood(asked)
    llm = LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for (context, continuation), (score, greedy) in zip(PAIRS, told, strict=True):
        if context:
            before, after = served._encode_pair(context, continuation)
        else:
            before, after = [served.prefix_token_id], served.tok_encode(continuation)
        (answer,) = llm.generate([[*before, *after]], params)
        assert answer.prompt_logprobs is not None
        mine = answer.prompt_logprobs[-len(after) :]
        assert score == pytest.approx(sum(each.logprob for each in mine), abs=1e-4)
        assert greedy == all(each.top[0][0] == each.token_id for each in mine)
