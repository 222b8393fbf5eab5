from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from infopt.core.artifact.read import read_artifact
from infopt.core.errors import EngineError, UsageError
from infopt.core.layers.embedding import Embedding
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.llm import LLM
from infopt.core.runtime.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(read_artifact(tiny_model), EngineSettings(kv_blocks=64, dtype="float32"))


def test_one_text_many_texts_and_tokens(llm: LLM) -> None:
    (one,) = llm.generate("Hello there", GREEDY)
    many = llm.generate(
        ["Hello there", "Something else", llm.tokenizer.encode("Hello there")], GREEDY
    )
    assert many[0] == many[2] == one
    assert one.prompt_token_ids == tuple(llm.tokenizer.encode("Hello there"))
    assert one.text == llm.tokenizer.decode(one.token_ids, clean_up_tokenization_spaces=False)
    assert (len(one.token_ids), one.finish_reason, one.logprobs) == (12, "length", None)


def test_a_stop_string_ends_its_request_and_frees_it(llm: LLM) -> None:
    (free,) = llm.generate("Hello there", GREEDY)
    stop = free.text[len(free.text) // 2 :][:3]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    (stopped,) = llm.generate("Hello there", params)
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    # What is left of the aborted request says nothing to the next call.
    assert llm.generate("Hello there", GREEDY) == [free]
    assert llm.engine.stats().blocks_used == 0


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=1)
    (found,) = llm.generate("Hello", params)
    assert found.logprobs is not None
    assert tuple(entry.token_id for entry in found.logprobs) == found.token_ids


def test_a_prompt_that_does_not_fit_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        llm.generate(["short", [5] * 5000], GREEDY)
    assert llm.engine.stats().waiting == 0


def test_logits_that_are_not_finite_are_told_and_leave_nothing_behind(tiny_model: Path) -> None:
    settings = EngineSettings(kv_blocks=8, dtype="float32", kernels="torch")
    broken = LLM(read_artifact(tiny_model), settings)
    (fine,) = broken.generate([[5, 6]], GREEDY)
    poison = next(token for token in range(100) if token not in (5, 6, *fine.token_ids))
    runner = broken.engine._runner
    table = runner.decoder.embedding.weight.clone()
    table[poison] = torch.nan
    # Untied: in the head, the row would spoil every request.
    runner.decoder = replace(runner.decoder, embedding=Embedding(table))
    with pytest.raises(EngineError, match=r"prompt 1: .*not finite"):
        broken.generate([[5, 6], [5, poison]], GREEDY)
    assert broken.engine.stats().blocks_used == 0
    assert broken.generate([[5, 6]], GREEDY) == [fine]


def test_embeddings(llm: LLM, tiny_model: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    prompts = ["Hello there", "Something else", [5, 6, 7]]
    tokens = [llm.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    with torch.inference_mode():
        states = [model(torch.tensor([each])).last_hidden_state[0] for each in tokens]
    for pooling, wanted in (
        ("mean", torch.stack([each.mean(0) for each in states])),
        ("last", torch.stack([each[-1] for each in states])),
    ):
        found = llm.embed(prompts, pooling)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.nn.functional.normalize(wanted), atol=1e-5, rtol=0)
    assert llm.embed("Hello there").shape == (1, 64)
    with pytest.raises(UsageError, match="the prompt is empty"):
        llm.embed(["fine", []])
    with pytest.raises(UsageError, match="pooling is for embed"):
        llm.generate("x", SamplingParams(pooling="mean"))
    assert llm.engine.stats().waiting == 0
