"""The tokenizers of most models without transformers, whose import takes longer than a model.

What generating and serving need of a tokenizer is read straight from `tokenizer.json`; all else is
asked of transformers' tokenizer, which is built when that happens first.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.core.artifact.chat_template import render_template

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

GENERIC = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that add nothing to what tokenizer.json says."""
FAMILIES = frozenset({"llama", "gpt2", "opt", "qwen3", "gemma2"})
"""Values of model_type whose generic tokenizers transformers takes as they are."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_HEEDED = {"tokenizer_class", "clean_up_tokenization_spaces", "chat_template", *SPECIAL}
# What does not touch tokens: a limit that the engine knows better, and what trainers pad with.
_IDLE = {"model_max_length", "model_input_names", "padding_side", "backend", "is_local"}
_OTHERS = ("added_tokens.json", "special_tokens_map.json", "tekken.json", "chat_template.json")
# Above, transformers may mend a pattern that some tokenizers were published with.
_VOCABULARY = 100_000


class PlainTokenizer:
    """As the tokenizer of transformers from the same files, for what the runtime asks of it."""

    def __init__(
        self,
        backend: "Tokenizer",
        chat_template: str | None,
        special: Mapping[str, str],
        whole: Callable[[], Any],
    ) -> None:
        """`whole` builds transformers' tokenizer."""
        self.chat_template = chat_template
        self.special_tokens_map = dict(special)
        self._backend = backend
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self._build, self._built = whole, None

    @property
    def added_tokens_decoder(self) -> "dict[int, AddedToken]":
        """What was added to the vocabulary, by its ids."""
        return self._added

    def encode(self, text: str, add_special_tokens: bool = True, **settings: Any) -> list[int]:
        """The tokens of a text."""
        if settings or not isinstance(text, str):
            found: list[int] = self.whole.encode(
                text, add_special_tokens=add_special_tokens, **settings
            )
            return found
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **settings: Any,
    ) -> Any:
        """The text of tokens."""
        one = isinstance(token_ids, list | tuple) and all(isinstance(t, int) for t in token_ids)
        if settings or clean_up_tokenization_spaces or not one:
            return self.whole.decode(
                token_ids,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                **settings,
            )
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """A token by its id, or a list of them."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(token)) for token in ids]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Raises ValueError where there is none."""
        found = chat_template or self.chat_template
        if found is None:
            raise ValueError("the tokenizer has no chat template")
        return found

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **settings: Any,
    ) -> Any:
        """A conversation through the template, as text where `tokenize` is False."""
        plain = _tables(conversation) and conversation and (tools is None or _tables(tools))
        if settings or tokenize or not plain:
            return self.whole.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                **settings,
            )
        return render_template(
            self.get_chat_template(chat_template),
            conversation,
            tools,
            self.special_tokens_map,
            answered=add_generation_prompt,
        )

    @property
    def whole(self) -> Any:
        """Transformers' tokenizer."""
        if self._built is None:
            self._built = self._build()
        return self._built

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(self, *given: Any, **settings: Any) -> Any:
        return self.whole(*given, **settings)

    def __getattr__(self, name: str) -> Any:
        # Python asks for names such as __deepcopy__ before there is an object to ask.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)


def plain_tokenizer(
    folder: Path, model_type: object, whole: Callable[[], Any]
) -> PlainTokenizer | None:
    """The tokenizer of a model directory; None where transformers' may differ from its files."""
    settings = _settings(folder)
    if settings is None or model_type not in FAMILIES:
        return None
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises nothing narrower; transformers will say what is wrong
        return None
    added = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
    special = {name: settings[name] for name in SPECIAL if settings.get(name) is not None}
    whole_file = (
        backend.truncation is None
        and backend.padding is None
        and backend.post_processor is not None
        and backend.get_vocab_size() <= _VOCABULARY
    )
    if not whole_file or not all(isinstance(t, str) and t in added for t in special.values()):
        return None
    template = _template(folder, settings)
    return PlainTokenizer(backend, template, special, whole)


def _settings(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json, where nothing in it or beside it asks for more than is done here."""
    try:
        found = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if (
        not isinstance(found, dict)
        or found.get("tokenizer_class") not in GENERIC
        or not found.keys() <= _HEEDED | _IDLE
        or found.get("clean_up_tokenization_spaces", False) is not False
        or not isinstance(found.get("chat_template", ""), str)
        or any((folder / name).exists() for name in _OTHERS)
        or (folder / "additional_chat_templates").exists()
    ):
        return None
    return found


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own wins."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        found = settings.get("chat_template")
        return found if isinstance(found, str) else None


def _tables(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, dict) for value in values)
