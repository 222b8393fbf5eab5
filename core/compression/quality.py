"""How well a model predicts held-out text, for a search that must keep a bound on it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.core.artifact.positions import known_positions
from infopt.core.artifact.read import Artifact
from infopt.core.errors import NumericsError
from infopt.core.models.hf import load_transformers
from infopt.core.text.sources import evaluation_text
from infopt.core.text.windows import token_stream

TOKENS = 8192
_CONTEXT = 1024


def held_out(artifact: Artifact) -> Tensor:
    """The first tokens of the default evaluation text, int64 [n]."""
    return token_stream(evaluation_text("default"), artifact.tokenizer(), chat=False, limit=TOKENS)


@torch.inference_mode()
def mean_nll(artifact: Artifact, stream: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    """Nats a token over windows of `stream` [n], the first of each not scored.

    Windows are of 1,024 tokens, or of as many as the model knows positions.
    """
    model = load_transformers(artifact, dtype, device)
    context = min(_CONTEXT, known_positions(artifact) or _CONTEXT)
    total, scored = 0.0, 0
    for window in torch.split(stream.to(device), context):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        scored += len(window) - 1
    if not total < float("inf"):
        raise NumericsError(f"the logits of {artifact.path} are not finite", "try --dtype float32")
    return total / scored
