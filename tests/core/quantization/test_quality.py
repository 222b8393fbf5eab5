"""What quantization costs the real default model on held-out text, and that GPTQ earns its keep."""

from collections.abc import Callable
from math import log
from pathlib import Path

import pytest

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.evaluation.evaluate import evaluate
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.evaluate import EvaluateSettings
from infopt.core.recipe.quantize import QuantizeSettings
from infopt.core.recipe.text import CalibrationSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# Enough to tell the methods apart; docs/results has the figures at full length.
CALIBRATION = CalibrationSettings(samples=16, sequence_length=512)
EVALUATION = EvaluateSettings(tokens=4096)


@pytest.fixture(scope="module")
def perplexity(
    default_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], float]:
    """Perplexity of the saved artifact of a method at some bits; 16 bits is the base."""
    folder: Path = tmp_path_factory.mktemp("quality")
    known: dict[tuple[str, int], float] = {}

    def measure(method: str, bits: int) -> float:
        if (method, bits) not in known:
            artifact = default_artifact
            if bits < 16:
                settings = QuantizeSettings.model_validate(
                    {"method": method, "bits": bits, "group_size": 64, "calibration": CALIBRATION}
                )
                quantize(default_artifact, folder / f"{method}{bits}", settings)
                artifact = read_artifact(folder / f"{method}{bits}")
            known[method, bits] = evaluate(artifact, EVALUATION).perplexity
        return known[method, bits]

    return measure


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.70), (3, 0.45)])
def test_gptq_loses_less_than_rounding(
    bits: int, bound: float, perplexity: Callable[[str, int], float]
) -> None:
    """Of what rounding to nearest loses in nats per token, GPTQ loses at most this share."""
    base = perplexity("none", 16)
    lost = {method: log(perplexity(method, bits) / base) for method in ("gptq", "rtn")}
    assert lost["rtn"] > 0.1, "rounding must cost something for the share to mean anything"
    assert lost["gptq"] / lost["rtn"] <= bound


def test_eight_bits_cost_next_to_nothing(perplexity: Callable[[str, int], float]) -> None:
    assert perplexity("gptq", 8) == pytest.approx(perplexity("none", 16), rel=0.003)
