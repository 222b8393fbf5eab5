"""How long a sequence may be, and which tokens end one."""

from infopt.core.artifact.read import Artifact, read_json
from infopt.core.errors import ResourceError, UsageError
from infopt.core.models.config import ModelConfig, token_ids
from infopt.core.recipe.serve import EngineSettings


def longest_sequence(config: ModelConfig, settings: EngineSettings) -> int:
    """The longest sequence asked for, else the longest that the model knows.

    Raises UsageError for one beyond what the model knows.
    """
    asked = settings.max_model_len
    if asked is None:
        return config.full_attention_positions
    if asked > config.max_positions:
        raise UsageError(
            f"max_model_len {asked} is beyond the {config.max_positions} positions of the model"
        )
    return asked


def held_sequence(limit: int, slots: int, settings: EngineSettings) -> int:
    """`limit`, or the cache's `slots` where no limit was asked for.

    Raises ResourceError where they do not hold the limit that was.
    """
    if settings.max_model_len is not None and slots < limit:
        raise ResourceError(
            f"a sequence of {limit} tokens does not fit into the KV cache of {slots}",
            "lower --max-model-len or raise --kv-blocks",
        )
    return min(limit, slots)


def read_eos_token_ids(artifact: Artifact) -> frozenset[int]:
    """The tokens that end a sequence: of generation_config.json, else of config.json."""
    file = artifact.path / "generation_config.json"
    found = token_ids(read_json(file).get("eos_token_id")) if file.exists() else ()
    return frozenset(found or token_ids(artifact.config.get("eos_token_id")))
