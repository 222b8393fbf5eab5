"""The plan refuses what the door would refuse, without torch."""

import pytest

from infopt.core.errors import UsageError
from infopt.core.evaluation.plan import plan_evaluate, protocol
from infopt.core.recipe.evaluate import EvaluateSettings


def test_memory_holds_both_models(make_artifact) -> None:
    artifact, baseline = make_artifact("one"), make_artifact("two")
    settings = EvaluateSettings(context=64, dtype="float32", device="cpu")
    alone = plan_evaluate(artifact, settings)
    both = plan_evaluate(artifact, settings, baseline)
    parameters = artifact.summary().parameters
    assert both.memory_bytes - alone.memory_bytes == 4 * (parameters + 64 * 256)
    assert "one, then two" in both.actions[0]


def test_a_bound_needs_a_baseline(make_artifact) -> None:
    settings = EvaluateSettings(context=64, max_ppl_increase="2%")
    with pytest.raises(UsageError, match="needs a baseline"):
        plan_evaluate(make_artifact("one"), settings)


def test_a_context_beyond_the_positions_is_refused(make_artifact) -> None:
    with pytest.raises(UsageError, match="context of 256 tokens exceeds the 128 positions of one"):
        plan_evaluate(make_artifact("one"), EvaluateSettings(context=256))


def test_the_protocol_is_said_in_words() -> None:
    assert "windows of 1024 tokens that do not overlap" in protocol(EvaluateSettings())
    assert "512 apart" in protocol(EvaluateSettings(stride=512))
