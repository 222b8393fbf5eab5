"""Tokens to text as they come: whole characters only, and nothing a stop string may take back."""

import re
from collections.abc import Collection, Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one request; pushes and finish, joined, are the decoded whole up to the stop.

    Where several stop strings are met, the one that is completed first ends the text (of those
    completed together, the longest), so the result does not depend on how tokens were grouped. In
    the text of the first `min_tokens` tokens no stop string is looked for.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown: Collection[int] = (),
    ) -> None:
        """Special tokens are left out, but for those `shown`, with `skip_special_tokens`."""
        assert all(stop), "an empty stop string would stop everything"
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._invisible = _special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._shows_some = not self._invisible.isdisjoint(shown)
        self._invisible -= frozenset(shown)
        self._skip_special = skip_special_tokens and not self._shows_some
        self._tokens: list[int] = []
        # Text is decoded from a window of tokens: those from `_context` to `_settled` are done with
        # and only give the decoder what it needs to see to the left (a leading space, say).
        self._context = 0
        self._settled = 0
        self._sent = 0  # characters of the window's new text that are already handed on
        self._held = ""  # decoded text that may be the beginning of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that is now safe to send."""
        if self.stopped_by is not None:
            return ""
        early = max(0, self._min_tokens - len(self._tokens))
        self._tokens.extend(token_ids[:early])
        text = self._decode_new(final=False) if early else ""
        self._tokens.extend(token_ids[early:])
        return text + self._until_stop(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """Return the rest: no more tokens come."""
        if self.stopped_by is not None:
            return ""
        return self._until_stop(self._decode_new(final=True), final=True)

    def _decode_new(self, *, final: bool) -> str:
        if not final and self._in_byte_run():
            return ""
        before = self._decode(self._tokens[self._context : self._settled])
        text = self._decode(self._tokens[self._context :])[len(before) :]
        # At most the last character can be the beginning of one whose other bytes are to come.
        whole = final or not text.endswith(_UNFINISHED)
        new = text[self._sent :] if whole else text[self._sent : -1]
        self._sent += len(new)
        if whole and text:
            self._context, self._settled, self._sent = self._settled, len(self._tokens), 0
        return new

    def _in_byte_run(self) -> bool:
        """Whether the last visible token is a single byte of the kind that is judged by its run.

        Byte-fallback decoders replace every byte of a run by U+FFFD if the run as a whole is not
        UTF-8, so its text is known only when the run is over.
        """
        for token_id in reversed(self._tokens):
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            if token is not None and token_id not in self._invisible:
                return _BYTE_TOKEN.fullmatch(token) is not None
        return False

    def _decode(self, token_ids: list[int]) -> str:
        if self._shows_some:
            token_ids = [token for token in token_ids if token not in self._invisible]
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _until_stop(self, new: str, *, final: bool) -> str:
        text = self._held + new
        met = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text
        ]
        if met:
            end, negative_length, self.stopped_by = min(met)
            self._held = ""
            return text[: end + negative_length]
        hold = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that decoding leaves out on request."""
    return frozenset(
        token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
    )


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
