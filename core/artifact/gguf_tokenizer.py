"""tokenizer.json and its settings, from the fields of a GGUF file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from infopt.core.errors import ArtifactError, UnsupportedError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
_PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}


def gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """The tokenizer's files by name: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Raises UnsupportedError for a tokenizer that is not known, ArtifactError for a damaged one.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ArtifactError(f"{path} has no tokenizer", "convert it again with its vocabulary")
    if len(set(tokens)) != len(tokens):
        raise ArtifactError(f"{path}: its vocabulary has a token twice")
    kind = fields.get("tokenizer.ggml.model")
    match kind:
        case "gpt2":
            tokenizer = _byte_level(path, fields, tokens)
        case "llama":
            tokenizer = _sentence_piece(path, fields, tokens)
        case _:
            raise UnsupportedError(
                f"{path}: its tokenizer is of the model {kind!r}", "known: gpt2, llama"
            )
    _add_tokens(tokenizer, fields, tokens)
    names = _special_names(path, fields, tokens)
    if _adds_bos(fields) and "bos_token" in names:
        _prepend(tokenizer, names["bos_token"], kind == "gpt2")
    elif kind == "gpt2":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    context = fields.get(f"{fields.get('general.architecture')}.context_length")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": context} if isinstance(context, int) else {}),
        **names,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    return files


def _byte_level(path: Path, fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """GPT-2's byte-level BPE, with the pre-tokenizer that the file names."""
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ArtifactError(f"{path}: its tokenizer has no merges")
    halves = [str(merge).partition(" ") for merge in merges]
    pairs = [(left, right) for left, _, right in halves]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not all(piece in vocabulary for a, b in pairs for piece in (a, b, a + b)):
        raise ArtifactError(f"{path}: its tokenizer has a merge of tokens that it lacks")
    pre = fields.get("tokenizer.ggml.pre")
    pre = _PRE_ALIASES.get(str(pre), pre)
    ignore_merges = pre == "llama-bpe"
    model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(path, pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(path: Path, pre: object) -> pre_tokenizers.PreTokenizer:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match pre:
        case "gpt-2":
            return whole
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, whole])
        case "llama-bpe" | "qwen2":
            pattern = Regex(_LLAMA3 if pre == "llama-bpe" else _QWEN2)
            split = pre_tokenizers.Split(pattern, behavior="isolated")
            return pre_tokenizers.Sequence([split, bytes_only])
    raise UnsupportedError(
        f"{path}: its tokenizer splits text in the way {pre!r}",
        f"known: {', '.join(_PRE_TOKENIZERS)}",
    )


def _sentence_piece(path: Path, fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """Llama's SentencePiece BPE: scores become an order of merges."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ArtifactError(f"{path}: its tokenizer has no score for each token")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    special = set(_special_numbers(fields, (_UNKNOWN, _CONTROL)))
    merges = merges_from_scores(
        {t: scores[number] for t, number in vocabulary.items() if number not in special}
    )
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise ArtifactError(f"{path}: its unknown token is {unknown!r}")
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), space] if prefix else [space]
    )
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token of the highest score first."""
    merges: list[tuple[float, str, str]] = []
    for token, score in scores.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                merges.append((score, left, right))
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in merges]


def _special_numbers(fields: Mapping[str, Any], kinds: tuple[int, ...]) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type")
    types = types if isinstance(types, list) else []
    return [number for number, kind in enumerate(types) if kind in kinds]


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens are special; user-defined ones are matched whole, but shown."""
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        numbers = [n for n in _special_numbers(fields, (kind,)) if n < len(tokens)]
        added = [AddedToken(tokens[n], normalized=False, special=special) for n in numbers]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _special_names(path: Path, fields: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    words = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    names: dict[str, str] = {}
    for word, short in words.items():
        number = fields.get(f"tokenizer.ggml.{word}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise ArtifactError(f"{path}: its {word} token is {number!r}")
        names[f"{short}_token"] = tokens[number]
    return names


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    """As llama.cpp decides: what the file says, else yes for SentencePiece and Llama 3."""
    pre = fields.get("tokenizer.ggml.pre")
    default = fields.get("tokenizer.ggml.model") == "llama" or (
        _PRE_ALIASES.get(str(pre), pre) == "llama-bpe"
    )
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def _prepend(tokenizer: Tokenizer, bos: str, byte_level: bool) -> None:
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    if byte_level:
        parts = [processors.ByteLevel(trim_offsets=False), template]
        tokenizer.post_processor = processors.Sequence(parts)
    else:
        tokenizer.post_processor = template
