"""What a conversion would need, before it is done."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.conversion.convert import convert
from infopt.core.conversion.plan import plan_convert
from infopt.core.errors import ResourceError
from infopt.core.recipe.convert import ConvertSettings

Open = Callable[[str], Artifact]


@pytest.mark.parametrize("format", ["gptq", "awq", "dense"])
def test_the_plan_knows_layers_and_disk(format: str, checkpoint: Open, tmp_path: Path) -> None:
    settings = ConvertSettings.model_validate({"format": format})
    found = plan_convert(checkpoint("ct-w4a16"), settings)
    assert "14 layers (int4 g32 sym) from compressed-tensors to " + format in found.actions[0]
    assert found.seconds is not None and found.seconds > 0
    report = convert(checkpoint("ct-w4a16"), tmp_path / "out", settings)
    assert 0.8 < found.disk_bytes / (2 * report.bytes) < 1.1


def test_a_model_yet_to_be_quantized_has_a_plan(checkpoint: Open, tmp_path: Path) -> None:
    convert(checkpoint("awq"), tmp_path / "dense", ConvertSettings(format="dense"))
    found = plan_convert(read_artifact(tmp_path / "dense"), ConvertSettings(format="gptq"))
    assert "gptq" in found.actions[0] and found.disk_bytes > 0


def test_a_full_disk_is_told_before(
    checkpoint: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError, match="MiB of disk"):
        convert(checkpoint("awq"), tmp_path / "out", ConvertSettings(format="gptq"))
    assert not (tmp_path / "out").exists()
