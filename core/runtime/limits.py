"""How long a sequence may be, what may be in it, and which tokens end one."""

from collections.abc import Sequence

from infopt.core.artifact.read import Artifact, read_json
from infopt.core.errors import ResourceError, UsageError
from infopt.core.models.config import ModelConfig, token_ids
from infopt.core.recipe.serve import EngineSettings
from infopt.core.runtime.request import SamplingParams


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


def check_request(prompt: Sequence[int], params: SamplingParams, vocabulary: int) -> None:
    """Raise UsageError for a prompt that is empty, and for tokens that the model does not know."""
    if not prompt:
        raise UsageError("the prompt is empty")
    for what, tokens in (
        ("the prompt has a token", prompt),
        ("logit_bias has a token", [token for token, _ in params.logit_bias]),
        ("stop_token_ids has a token", params.stop_token_ids),
    ):
        if not all(0 <= token < vocabulary for token in tokens):
            raise UsageError(f"{what} that is not among the model's {vocabulary}")


def requested_length(prompt: int, params: SamplingParams, limit: int) -> int:
    """Tokens that a request with a prompt of so many has at its end; UsageError beyond `limit`."""
    new = 0 if params.pooling is not None else params.max_tokens
    length = limit if new is None else prompt + new
    least = prompt if new == 0 else prompt + 1
    if max(length, least) > limit:
        asked = f" and {new} new ones" if new else ""
        raise UsageError(
            f"{prompt} prompt tokens{asked} do not fit: this engine holds {limit}",
            "shorten the prompt, lower max_tokens, or raise --max-model-len or --kv-blocks",
        )
    return length


def read_eos_token_ids(artifact: Artifact) -> frozenset[int]:
    """The tokens that end a sequence: of generation_config.json, else of config.json."""
    file = artifact.path / "generation_config.json"
    found = token_ids(read_json(file).get("eos_token_id")) if file.exists() else ()
    return frozenset(found or token_ids(artifact.config.get("eos_token_id")))
