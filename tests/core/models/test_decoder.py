"""The decoder against transformers, for each kind of model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from infopt.core.artifact.read import Artifact, read_artifact
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
    if decoder.config.position_offset:  # rows before the first position are left out
        stored -= decoder.config.position_offset * decoder.config.hidden_size * 4
    repeated = 0
    if decoder.config.qk_norm:  # one weight a head, where the checkpoint has one for all
        heads = decoder.config.heads + decoder.config.kv_heads - 2
        repeated = decoder.config.layers * heads * decoder.config.head_dim * 4
    assert decoder.resident_bytes == stored + repeated
    table = 0 if decoder.config.tied_embeddings else decoder.embedding.nbytes
    if decoder.positions is not None:
        table += decoder.positions.nbytes
    experts = decoder.config.experts
    if experts is not None:  # a token reads those that it is routed to
        idle = (experts.count - experts.per_token) * sum(experts.layers)
        table += idle * 3 * experts.intermediate_size * decoder.config.hidden_size * 4
    assert decoder.step_bytes == decoder.resident_bytes - table


@torch.inference_mode()
def test_stacked_experts_are_those_apart(tiny: Tiny, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and some files on disk."""
    artifact, model = tiny("mixtral")
    copy = tmp_path / "stacked"
    shutil.copytree(artifact.path, copy)
    tensors = load_file(copy / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".experts." not in name}
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            kept[name.replace(".mlp.", ".block_sparse_moe.")] = parameter.detach().contiguous()
    assert len(kept) < len(tensors)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    apart, stacked = (load_decoder(a, torch.float32, CPU) for a in (artifact, read_artifact(copy)))
    x = torch.randn(7, apart.config.hidden_size)
    for one, other in zip(apart.layers, stacked.layers, strict=True):
        torch.testing.assert_close(one.mlp(x), other.mlp(x), atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_a_base_models_checkpoint_has_no_first_word(tiny: Tiny, tmp_path: Path) -> None:
    """GPT-2's own files name h.0, not transformer.h.0."""
    artifact, model = tiny("gpt2")
    copy = tmp_path / "base"
    shutil.copytree(artifact.path, copy)
    tensors = load_file(copy / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, copy / "model.safetensors", metadata={"format": "pt"})
    decoder = load_decoder(read_artifact(copy), torch.float32, CPU)
    assert torch.equal(decoder.embedding.weight, model.transformer.wte.weight)
