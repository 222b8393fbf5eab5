"""What an answer has to match, and the place that an answer on its way has in it."""

import json
import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
MAX_GRAMMAR = 64 * 1024
"""Characters: grammars are compiled between two steps of the engine."""
MAX_MULTIPLES = 10_000
"""What the `multipleOf` of a grammar may multiply to, zeros at their ends aside: each remainder is
a state of its automaton, and a million of them are ten seconds in which nobody gets a token."""
# Room for indentation, and an end: a weak model would go on with white space to its last token.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
_SCHEMA_IN_LARK = re.compile(r"%json\s*")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A JSON schema, any JSON object, a regular expression, one of some texts, or a Lark grammar.

    `text` is the schema, the expression, the list of texts as JSON, or the grammar. Raises
    UsageError for one that is empty where something is needed.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "json_object", "regex", "choice", "lark"):
            raise UsageError(f"there is no kind of grammar {self.kind!r}")
        if len(self.text) > MAX_GRAMMAR:
            raise UsageError(f"the {self.kind} is longer than {MAX_GRAMMAR:,} characters")
        if (self.kind == "json_object") is bool(self.text):
            raise UsageError(f"a grammar of kind {self.kind} with the text {self.text[:80]!r}")

    @staticmethod
    def json_schema(schema: dict[str, Any]) -> "Grammar":
        try:
            return Grammar("json_schema", json.dumps(schema))
        except RecursionError:
            raise UsageError("the json_schema is nested too deeply") from None

    @staticmethod
    def choice(texts: Sequence[str]) -> "Grammar":
        return Grammar("choice", json.dumps(list(texts), ensure_ascii=False))


class Constraint:
    """How far an answer has come in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> "Tensor":
        """bool [vocabulary]: the tokens that may come next, the end among them where it may.

        None may where the grammar gave up.
        """
        # Here: an API process knows grammars, and starts in a third of the time without torch.
        import torch

        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        out = torch.zeros(self._vocabulary, dtype=torch.bool)
        if self._matcher.is_error():
            # It ran into a limit of its own, and would pass an unfinished answer off as a match.
            return out
        mask = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()
        # Logits may be padded beyond the tokenizer's vocabulary, as its bits are to whole words.
        out[: len(mask)] = mask[: self._vocabulary]
        return out

    def accept(self, token: int) -> bool:
        """Go on by a token; False if the grammar gave up on it (a limit of its own)."""
        return bool(self._matcher.consume_token(token))

    @property
    def is_over(self) -> bool:
        """Whether only the end can follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> "Constraint":
        return Constraint(self._matcher.deep_copy(), self._vocabulary)


def tokenizer_source(artifact: Artifact) -> str:
    """An artifact's tokenizer as JSON, read without transformers where it has a tokenizer.json.

    transformers takes seconds to import, and this may be called between two steps. Raises
    UnsupportedError for a tokenizer that is not of the `tokenizers` library.
    """
    file = artifact.path / "tokenizer.json"
    found: Any
    if file.exists():
        found = Tokenizer.from_file(str(file))
    else:
        found = getattr(artifact.tokenizer(), "backend_tokenizer", None)
    if found is None:
        raise UnsupportedError(f"grammars need a fast tokenizer, and {artifact.name} has none")
    found.no_padding()
    found.no_truncation()
    return str(found.to_str())


class GrammarCompiler:
    """Turns grammars into constraints for one tokenizer, by llguidance."""

    def __init__(self, tokenizer: str, vocabulary: int, ends: Collection[int]) -> None:
        """`tokenizer` is as `tokenizer_source` reads it.

        Raises UnsupportedError where llguidance is not installed or reads no such tokenizer.
        """
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise UnsupportedError(
                "grammars need llguidance, which is not installed", "pip install 'infopt[serve]'"
            ) from error
        try:
            self._tokenizer = LLTokenizer(tokenizer, eos_token=sorted(ends) or None)
        except (ValueError, RuntimeError) as error:
            raise UnsupportedError(f"grammars do not work with this tokenizer: {error}") from error
        self._vocabulary = vocabulary

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises UsageError for a grammar that is none, or that nothing matches."""
        from llguidance import LLMatcher

        check_multiples(grammar)
        # The matcher never raises for what users write: it says what is wrong when asked.
        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0)
        if matcher.is_error():
            reason = " ".join(str(matcher.get_error()).split())
            raise UsageError(f"the {grammar.kind} is refused: {reason[:300]}")
        return Constraint(matcher, self._vocabulary)


def check_multiples(grammar: Grammar) -> None:
    """Raise UsageError for `multipleOf` in schemas that would take too long to compile."""
    found: set[int] = set()

    def pairs(members: list[tuple[str, Any]]) -> None:
        for key, value in members:
            if key == "multipleOf" and isinstance(value, Decimal):
                digits = "".join(map(str, value.as_tuple().digits)).rstrip("0")
                found.add(int(digits[:20] or "1"))

    decoder = json.JSONDecoder(
        object_pairs_hook=pairs, parse_int=Decimal, parse_float=Decimal, parse_constant=str
    )
    match grammar.kind:
        case "json_schema":
            starts = [len(grammar.text) - len(grammar.text.lstrip())]
        case "lark":
            starts = [place.end() for place in _SCHEMA_IN_LARK.finditer(grammar.text)]
        case _:
            return
    for start in starts:
        with suppress(ValueError, RecursionError):  # which llguidance then has words for
            decoder.raw_decode(grammar.text, start)
    if math.prod(found) > MAX_MULTIPLES:
        raise UsageError(f"the {grammar.kind} is refused: multipleOf comes to over {MAX_MULTIPLES}")


def _source(grammar: Grammar) -> str:
    """As llguidance reads it."""
    from llguidance import LLMatcher

    try:
        match grammar.kind:
            case "json_schema":
                return _json_source(grammar.text)
            case "json_object":
                return _json_source('{"type": "object"}')
            case "regex":
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case "lark":
                return str(LLMatcher.grammar_from_lark(grammar.text))
            case "choice":
                texts = json.loads(grammar.text)
                if not texts or not all(isinstance(text, str) and text for text in texts):
                    raise UsageError("a choice needs texts that are not empty")
                # A literal of Lark is written as one of JSON is, but for one control character.
                literals = (
                    json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
                    for text in texts
                )
                return str(LLMatcher.grammar_from_lark(f"start: {' | '.join(literals)}"))
    except ValueError as error:
        raise UsageError(f"the {grammar.kind} is refused: {error}") from error


def _json_source(schema: str) -> str:
    from llguidance import LLMatcher

    overrides: Any = {"whitespace_pattern": _WHITE_SPACE}
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=overrides))
