"""Acceptance, counted by hand, and against transformers' own greedy text."""

import itertools
from collections.abc import Callable

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.compression.quality import held_out, mean_nll
from infopt.core.distillation.acceptance import (
    accepted_runs,
    agreement,
    judge,
    look_at,
    read_text,
)
from infopt.core.errors import NumericsError, UsageError
from infopt.core.models.hf import load_transformers

CPU = torch.device("cpu")
MakeLlama = Callable[..., Artifact]


def test_agreement_is_a_share() -> None:
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])) == 0.5


def test_runs_are_those_of_a_draft_and_its_verifier() -> None:
    yes, no = True, False
    assert accepted_runs([yes] * 10, 4) == [4, 4]
    assert accepted_runs([no] * 5, 4) == [0, 0]
    assert accepted_runs([yes, yes, no, yes, no, yes, yes, yes, yes], 4) == [2, 1, 4]
    assert accepted_runs([yes] * 3, 4) == []
    for agree in itertools.product([no, yes], repeat=9):
        place, wanted = 0, []
        while place + 2 <= 9:
            run = 0
            while run < 2 and agree[place + run]:
                run += 1
            wanted.append(run)
            place += run + 1
        assert accepted_runs(list(agree), 2) == wanted


def test_a_model_is_the_best_draft_of_itself(make_llama: MakeLlama) -> None:
    artifact = make_llama(max_position_embeddings=2048, lively=True)
    model = load_transformers(artifact, torch.float32, CPU)
    text = held_out(artifact)[:2100]
    original = look_at(model, text)
    nll, draft = judge(model, original)
    assert (draft.text, draft.greedy, draft.mean_run) == (1.0, 1.0, 4.0)
    assert nll == original.read.nll == pytest.approx(mean_nll(artifact, text, torch.float32, CPU))
    assert len(original.read.choices) == 2100 - 3
    written = original.written
    again = model.generate(
        written[:, : original.prompt],
        max_new_tokens=written.shape[1] - original.prompt,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(again, written)


def test_another_model_is_a_worse_draft(make_llama: MakeLlama) -> None:
    artifact = make_llama(lively=True)
    model, other = (load_transformers(artifact, torch.float32, CPU) for _ in range(2))
    original = look_at(model, held_out(artifact)[:300])
    torch.manual_seed(1)
    head = other.get_output_embeddings().weight
    # Two heads that know nothing of each other agree about one token in 256: at none of the 299
    # positions in most cases, and never at ten.
    head.copy_(torch.randn(256, 64))
    nll, draft = judge(other, original)
    assert nll > original.read.nll
    assert max(draft.text, draft.greedy) < 10 / 299 and draft.mean_run < 0.1
    # A head that is nearly the teacher's is a better draft, and not a perfect one.
    head.copy_(model.get_output_embeddings().weight + 0.05 * torch.randn(256, 64))
    _, near = judge(other, original)
    assert draft.text < near.text < 1 and draft.greedy < near.greedy < 1
    assert draft.mean_run < near.mean_run < 4


def test_windows_stay_within_the_positions_that_are_known(make_llama: MakeLlama) -> None:
    artifact = make_llama()
    model = load_transformers(artifact, torch.float32, CPU)
    text = held_out(artifact)[:300]
    found = read_text(model, text)
    assert len(found.choices) == 300 - 3
    first = model(input_ids=text[None, :127]).logits[0].argmax(-1)
    assert torch.equal(found.choices[:127], first)


def test_faults_are_told(make_llama: MakeLlama) -> None:
    model = load_transformers(make_llama(), torch.float32, CPU)
    with pytest.raises(UsageError, match="10 tokens"):
        look_at(model, torch.zeros(10, dtype=torch.int64))
    model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        read_text(model, torch.zeros(20, dtype=torch.int64))
