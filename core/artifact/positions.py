"""How many positions a model knows, and windows that fit into them (no torch)."""

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UsageError

_KEYS = ("max_position_embeddings", "n_positions")


def known_positions(artifact: Artifact) -> int | None:
    """The longest sequence that the config names; None where it names none."""
    found = (artifact.config.get(key) for key in _KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def check_length(artifact: Artifact, length: int, word: str = "sequence_length") -> None:
    """Raise UsageError for windows of more tokens than the model knows; `word` is the setting."""
    known = known_positions(artifact)
    if known is not None and length > known:
        raise UsageError(
            f"{artifact.name} knows {known} positions, not the {length} of {word}",
            f"ask for windows of {known} tokens or fewer",
        )
