"""lm-eval's local-completions sees the scores that the engine gives in process."""

from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact.read import read_artifact
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings
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


FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "rtn", "bits": 4, "group_size": 32, "format": "gptq"},
    "awq": {
        "method": "rtn", "bits": 4, "group_size": 32, "symmetric": False, "format": "awq",
    },
    "compressed-tensors, packed": {
        "method": "rtn", "bits": 4, "group_size": 32, "format": "compressed-tensors",
    },
    "compressed-tensors, W8A8-int8": {"method": "rtn", "scheme": "W8A8-int8"},
    "compressed-tensors, W8A8-fp8": {"method": "fp8"},
    "fp8, blocks": {"method": "fp8", "fp8": "block"},
    "bitsandbytes, int8": {"method": "llm-int8"},
    "bitsandbytes, nf4": {"method": "nf4"},
}  # fmt: skip


def test_loglikelihoods_are_those_in_process(server: Any, tiny_model: Path) -> None:
    compare(server.url, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_the_same_after_each_format(
    launch: Any, tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tmp_path / "quantized"
    source = wider(tiny_model, tmp_path / "wide") if options.get("fp8") == "block" else tiny_model
    quantize(read_artifact(source), model, QuantizeSettings.model_validate(options))
    running = launch(model=model).ready()
    try:
        compare(running.url, model)
    finally:
        assert running.stop() == 0


def wider(tiny_model: Path, folder: Path) -> Path:
    """Blocks of 128 by 128 want sides that they divide."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size = config.intermediate_size = 128
    config.head_dim, config.num_key_value_heads = 32, 4
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def compare(url: str, model: Path) -> None:
    """What lm-eval is told over HTTP, and what the engine says in process."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    served = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{url}/v1/completions",
        tokenizer=str(model),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        batch_size=4,
        max_length=512,
    )
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    told = served.loglikelihood(asked)
    llm = LLM(read_artifact(model), EngineSettings(kv_blocks=64, dtype="float32"))
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
