from pathlib import Path
from typing import Any

import pytest

from infopt.core.artifact.positions import check_length, known_positions
from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError


def model(config: dict[str, Any]) -> Artifact:
    return Artifact(name="m", path=Path("m"), config=config, headers={}, files={})


def test_positions_are_found_by_either_key() -> None:
    assert known_positions(model({"max_position_embeddings": 64})) == 64
    assert known_positions(model({"n_positions": 32})) == 32
    assert known_positions(model({})) is None


def test_windows_beyond_them_are_refused_by_their_settings_name() -> None:
    check_length(model({"n_positions": 32}), 32)
    check_length(model({}), 10**6)
    with pytest.raises(UsageError, match="m knows 32 positions, not the 33 of retrain_length"):
        check_length(model({"n_positions": 32}), 33, "retrain_length")
