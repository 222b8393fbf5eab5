"""The decoder against transformers, for each kind of model."""

from collections.abc import Callable
from typing import Any

import torch

from infopt.core.artifact.read import Artifact
from infopt.core.models.decoder import StepInputs
from infopt.core.models.load import load_decoder
from infopt.kernels.attention.cache import new_cache
from infopt.kernels.attention.paged import plan_attention

CPU = torch.device("cpu")
Tiny = Callable[[str], tuple[Artifact, Any]]


@torch.inference_mode()
def test_logits_equal_transformers_over_a_ragged_batch(kind: str, tiny: Tiny) -> None:
    """Two prompts, one in two chunks, the other's second chunk a single token."""
    artifact, model = tiny(kind)
    decoder = load_decoder(artifact, torch.float32, CPU)
    config = decoder.config
    caches = [
        new_cache(20, 4, config.kv_heads, config.head_dim, torch.float32, CPU).fill_(torch.nan)
        for _ in range(config.layers)
    ]
    prompts = [torch.randint(config.vocab_size, (n,)) for n in (37, 12)]
    tables = [list(range(19, 0, -2)), list(range(0, 6, 2))]

    def step(parts: list[tuple[int, int, int]]) -> torch.Tensor:
        """(prompt, start, end) -> logits of all those tokens."""
        ids = torch.cat([prompts[p][start:end] for p, start, end in parts])
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        slots = [
            tables[p][i // 4] * 4 + i % 4 for p, start, end in parts for i in range(start, end)
        ]
        starts = [0]
        for _, start, end in parts:
            starts.append(starts[-1] + end - start)
        plan = plan_attention(
            [tables[p] for p, _, _ in parts],
            [end for _, _, end in parts],
            starts,
            4,
            torch.float32,
            CPU,
        )
        return decoder.logits(
            decoder(StepInputs(ids, positions, torch.tensor(slots), plan), caches)
        )

    first = step([(0, 0, 20), (1, 0, 11)])
    second = step([(1, 11, 12), (0, 20, 37)])
    ours = [torch.cat((first[:20], second[1:])), torch.cat((first[20:], second[:1]))]
    for prompt, logits in zip(prompts, ours, strict=True):
        wanted = model(prompt[None]).logits[0]
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-5)


def test_bytes_of_the_weights(kind: str, tiny: Tiny) -> None:
    artifact, model = tiny(kind)
    decoder = load_decoder(artifact, torch.float32, CPU)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    repeated = 0
    if decoder.config.qk_norm:  # one weight a head, where the checkpoint has one for all
        heads = decoder.config.heads + decoder.config.kv_heads - 2
        repeated = decoder.config.layers * heads * decoder.config.head_dim * 4
    assert decoder.resident_bytes == stored + repeated
    table = 0 if decoder.config.tied_embeddings else decoder.embedding.nbytes
    assert decoder.step_bytes == decoder.resident_bytes - table
