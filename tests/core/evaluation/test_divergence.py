"""KL and agreement against the definition in float64."""

import pytest
import torch
from torch.nn.functional import kl_div

from infopt.core.evaluation import perplexity
from infopt.core.evaluation.divergence import divergence


def logits(seed: int) -> torch.Tensor:
    return torch.randn(23, 60, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("chunk", [1, 4 * 60 * 5, 2**26])
def test_divergence_is_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", chunk)
    base, model = logits(0), logits(1)
    kl, agree = divergence(base, model)
    log_p, log_q = base.double().log_softmax(1), model.double().log_softmax(1)
    expected = kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(agree, base.argmax(1) == model.argmax(1))
    assert 0 < int(agree.sum()) < 23 or not agree.any()


def test_direction_is_from_the_baseline() -> None:
    sure, unsure = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(divergence(sure, unsure)[0]) == pytest.approx(0.6931, abs=1e-3)
    assert float(divergence(unsure, sure)[0]) == pytest.approx(9.3069, abs=1e-3)


def test_nothing_diverges_from_itself() -> None:
    kl, agree = divergence(logits(0), logits(0).clone())
    assert not kl.any()
    assert agree.all()


def test_an_impossible_token_adds_nothing() -> None:
    base = logits(0)
    base[:, 3] = -torch.inf
    assert not divergence(base, base.clone())[0].any()
    assert divergence(base, logits(1))[0].isfinite().all()
