"""Text to tokens: windows for calibration, one stream for evaluation.

No BOS is added unless the tokenizer adds one by default; then each calibration window and the
evaluation stream start with it. A chat template brings its own.
"""

from typing import TYPE_CHECKING, Any

from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.text.sources import Text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"
# A user's message of about 500 tokens; longer documents become several conversations.
_MESSAGE_CHARACTERS = 2048


def token_windows(
    text: Text,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    count: int,
    seed: int,
    chat: bool,
) -> "Tensor":
    """`count` windows that do not overlap, drawn by `seed`: int64 [count, length].

    Raises UsageError where the text is too short, naming how many windows it holds.
    """
    import torch

    prefix = [] if chat else default_prefix(tokenizer)
    step = length - len(prefix)
    if step < 1:
        raise UsageError(f"windows of {length} tokens have no room for text")
    tokens = _encode(tokenizer, _joined(text, tokenizer, chat))
    possible = len(tokens) // step
    if possible < count:
        raise UsageError(
            f"the text {text.name} has {len(tokens)} tokens: enough for {possible} windows of"
            f" {length}, not {count}",
            f"ask for {possible} samples, shorter ones, or give a longer text"
            if possible
            else "ask for shorter samples or give a longer text",
        )
    generator = torch.Generator().manual_seed(seed)
    # The rest that fills no window is left out before or behind, as the seed says.
    start = int(torch.randint(len(tokens) - possible * step + 1, (1,), generator=generator))
    rows = tokens[start : start + possible * step].view(possible, step)
    chosen = rows[torch.randperm(possible, generator=generator)[:count]]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), chosen], dim=1)


def token_stream(
    text: Text,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    chat: bool,
    limit: int | None = None,
) -> "Tensor":
    """The documents joined by an empty line, as at most `limit` tokens: int64 [n]."""
    import torch

    prefix = [] if chat else default_prefix(tokenizer)
    tokens = _encode(tokenizer, _joined(text, tokenizer, chat))
    return torch.cat([torch.tensor(prefix, dtype=torch.int64), tokens])[:limit]


def default_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before any text by default: its BOS, or nothing."""
    word = "a"
    plain = tokenizer(word, add_special_tokens=False)["input_ids"]
    whole = tokenizer(word)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []


def _joined(text: Text, tokenizer: "PreTrainedTokenizerBase", chat: bool) -> str:
    if not chat:
        return _SEPARATOR.join(text.documents)
    if not tokenizer.chat_template:
        raise UnsupportedError(
            "the model has no chat template", "leave chat away, or use a chat model"
        )
    if text.conversations is not None:
        conversations: list[Any] = [list(messages) for messages in text.conversations]
    else:
        pieces = (piece for document in text.documents for piece in _pieces(document))
        conversations = [[{"role": "user", "content": piece}] for piece in pieces]
    return "".join(str(tokenizer.apply_chat_template(c, tokenize=False)) for c in conversations)


def _pieces(document: str) -> list[str]:
    """The document cut between paragraphs into messages of about `_MESSAGE_CHARACTERS`."""
    pieces: list[str] = []
    size = 0
    for paragraph in document.split(_SEPARATOR):
        if not pieces or size + len(paragraph) > _MESSAGE_CHARACTERS:
            pieces.append(paragraph)
            size = len(paragraph)
        else:
            pieces[-1] += _SEPARATOR + paragraph
            size += len(_SEPARATOR) + len(paragraph)
    return [piece for piece in pieces if piece.strip()]


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> "Tensor":
    import torch

    # verbose=False: that a text is longer than the model's context is no news here.
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)
