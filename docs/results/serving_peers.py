"""transformers' two ways to serve many requests, for serving_ratios.py: output tokens a second."""

import logging
import time
from typing import Any

import torch  # noqa: TID253


def padded(model: Any, prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
    """Padded on the left to the longest prompt, and on to the longest answer."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    new = max(outputs)
    began = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - began
    assert made.shape == (len(prompts), width + new)
    return {"seconds": seconds, "output_tokens_per_s": sum(outputs) / seconds}


def continuous(model: Any, prompts: list[list[int]], outputs: list[int]) -> dict[str, Any]:
    """What `generate_batch` does, but that each request has its own limit; without the start.

    The cache holds all requests at once: left alone, it would take most of the memory.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    blocks = sum(-(-(len(p) + o) // 32) + 1 for p, o in zip(prompts, outputs, strict=True))
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=32, num_blocks=blocks, max_batch_tokens=512
        ),
        timeout=30,
    ) as manager:
        began = time.perf_counter()
        for prompt, output in zip(prompts, outputs, strict=True):
            manager.add_request(prompt, max_new_tokens=output, eos_token_id=-1)
        made = 0
        for _ in prompts:
            result = None
            while result is None or not result.is_finished():
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError(f"its thread ended: {manager.fatal_error}")
            if result.error is not None:
                raise RuntimeError(result.error)
            made += len(result.generated_tokens)
        seconds = time.perf_counter() - began
    assert made == sum(outputs)
    return {"seconds": seconds, "output_tokens_per_s": made / seconds}
