"""Whatever the tokens and their grouping: the pieces, joined, are the whole up to the stop."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infopt.core.text.detokenize import Detokenizer

EMOJI = "👩‍🚀"


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte a token, and a few words: a character of several bytes is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["he", "ll", "hell", "hello", "Ġw", "Ġwor"]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r")]
    vocabulary["or"] = len(vocabulary)
    merges.append(("Ġw", "or"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are ▁, unknown characters bytes that are judged a run at a time."""
    words = [
        "<unk>",
        "▁",
        "▁hello",
        "▁wor",
        "ld",
        "l",
        "o",
        "é",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    vocabulary = {token: i for i, token in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
}


def whole(tokenizer: Any, groups: list[list[int]]) -> str:
    text: str = tokenizer.decode(
        [token for group in groups for token in group],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return text


def up_to_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning that contains a stop string, without that string."""
    for end in range(len(text) + 1):
        met = [s for s in stop if text[:end].endswith(s)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces(detokenizer: Detokenizer, groups: list[list[int]]) -> list[str]:
    return [detokenizer.push(group) for group in groups] + [detokenizer.finish()]


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_whole(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, len(tokenizer) - 1)
    groups = data.draw(st.lists(st.lists(token, max_size=3), max_size=15))
    detokenizer = Detokenizer(tokenizer)
    assert "".join(pieces(detokenizer, groups)) == whole(tokenizer, groups)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_pieces_end_before_the_stop(name: str, data: st.DataObject) -> None:
    """Text of few letters, so that stop strings are met, half met and met at once."""
    tokenizer = TOKENIZERS[name]
    letters = {"byte level": "hel ow", "byte fallback": "loé"}[name]
    ids = tokenizer.convert_tokens_to_ids([c.replace(" ", "Ġ") for c in letters])
    groups = data.draw(st.lists(st.lists(st.sampled_from(ids), max_size=4), max_size=15))
    stop = data.draw(st.lists(st.text(letters, min_size=1, max_size=4), max_size=3))
    detokenizer = Detokenizer(tokenizer, stop=stop)
    found = "".join(pieces(detokenizer, groups))
    assert (found, detokenizer.stopped_by) == up_to_stop(whole(tokenizer, groups), stop)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@given(text=st.lists(st.sampled_from(["é", "€", EMOJI, "a", " ", "\ufffd"])).map("".join))
@settings(max_examples=100, deadline=None)
def test_no_piece_holds_half_a_character(name: str, text: str) -> None:
    """Pushed byte by byte, text comes without a replacement character of the decoder's making."""
    tokenizer = TOKENIZERS[name]
    symbols = {
        "byte level": lambda: tokenizer.tokenize(text),
        "byte fallback": lambda: [f"<0x{b:02X}>" for b in text.encode()],
    }
    tokens = tokenizer.convert_tokens_to_ids(symbols[name]())
    found = pieces(Detokenizer(tokenizer), [[token] for token in tokens])
    assert "".join(found) == (text.removeprefix(" ") if name == "byte fallback" else text)


def byte_tokens(text: str) -> list[int]:
    tokens: list[int] = TOKENIZERS["byte level"].encode(text)
    return tokens


def test_an_emoji_comes_when_it_is_whole() -> None:
    tokens = byte_tokens("👍")
    assert len(tokens) == 4
    assert pieces(Detokenizer(TOKENIZERS["byte level"]), [[t] for t in tokens]) == [
        "",
        "",
        "",
        "👍",
        "",
    ]


def test_what_stays_incomplete_comes_at_the_end() -> None:
    tokens = byte_tokens("a👍")[:3]
    found = pieces(Detokenizer(TOKENIZERS["byte level"]), [[t] for t in tokens])
    assert found == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.fixture
def send() -> Callable[[Detokenizer, str], str]:
    def by_character(detokenizer: Detokenizer, text: str) -> str:
        return "".join(detokenizer.push(byte_tokens(c)) for c in text)

    return by_character


def test_a_stop_string_across_tokens(send: Callable[[Detokenizer, str], str]) -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte level"], stop=("STOP", "\n\n"))
    assert send(detokenizer, "go STO") == "go "
    assert send(detokenizer, "RE ") == "STORE "
    assert send(detokenizer, "STOP it") == ""
    assert detokenizer.stopped_by == "STOP"
    assert detokenizer.push(byte_tokens("more")) == detokenizer.finish() == ""


def test_the_held_beginning_of_a_stop_string_comes_at_the_end(
    send: Callable[[Detokenizer, str], str],
) -> None:
    detokenizer = Detokenizer(TOKENIZERS["byte level"], stop=("STOP",))
    assert send(detokenizer, "go STO") + detokenizer.finish() == "go STO"
    assert detokenizer.stopped_by is None


def test_special_tokens_are_left_out_or_kept() -> None:
    tokenizer = TOKENIZERS["byte level"]
    tokens = [*byte_tokens("hi"), tokenizer.eos_token_id]
    assert "".join(pieces(Detokenizer(tokenizer), [tokens])) == "hi"
    kept = Detokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(pieces(kept, [tokens])) == "hi<end>"


def test_some_special_tokens_are_shown() -> None:
    """Those that mean something to who reads the text; stop strings and pieces are as ever."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>", "<pad>"]})
    call, pad, end = tokenizer.convert_tokens_to_ids(["<call>", "<pad>", "<end>"])
    word = tokenizer.encode("hello w")
    tokens = [pad, *word, call, end, *word, pad]
    for each in (1, 2, 100):
        detokenizer = Detokenizer(tokenizer, shown=[call])
        pieces = [detokenizer.push(tokens[n : n + each]) for n in range(0, len(tokens), each)]
        assert "".join(pieces) + detokenizer.finish() == "hello w<call>hello w"
    everything = Detokenizer(tokenizer, shown=[call], skip_special_tokens=False)
    assert everything.push(tokens) + everything.finish() == tokenizer.decode(tokens)
    stopped = Detokenizer(tokenizer, shown=[call], stop=["<call>"])
    assert stopped.push(tokens) == "hello w" and stopped.stopped_by == "<call>"
