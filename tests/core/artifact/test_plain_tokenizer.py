"""The tokenizer that is read without transformers is held to transformers' own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from infopt.core.artifact.chat_template import render_template
from infopt.core.artifact.plain_tokenizer import FAMILIES, PlainTokenizer, plain_tokenizer

TEXTS = (
    "hello  world",
    "<s>user\nhi</s>",
    "日本語 é \u200b 123",
    " lead",
    "",
    "a\n\n\nb\t",
    "<s></s>",
)
CHAT = (
    "{%- for m in messages %}\n{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}\n"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}"
    "{% generation %}x{{ eos_token }}{% endgeneration %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": " <b>é "}, {"role": "assistant", "content": "yes"}]


def written(folder: Path, model_type: str = "llama", **settings: object) -> Path:
    """A model directory's tokenizer of bytes, its special tokens written where asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens(["user"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**words, **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def plain(folder: Path, model_type: str = "llama") -> PlainTokenizer:
    found = plain_tokenizer(folder, model_type, lambda: pytest.fail("transformers was asked"))
    assert found is not None
    return found


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_tokens_and_texts_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    ours = plain(written(tmp_path, model_type), model_type)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(theirs).__name__ in ("TokenizersBackend", "PreTrainedTokenizerFast")
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids
            told = {"skip_special_tokens": special}
            assert ours.decode(ids, **told) == theirs.decode(ids, **told)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(9999) is None
    assert len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    both = [{n: str(t) for n, t in x.added_tokens_decoder.items()} for x in (ours, theirs)]
    assert both[0] == both[1]


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "é<"}}]])
def test_chats_are_rendered_as_by_transformers(tmp_path: Path, as_file: bool, tools: Any) -> None:
    folder = written(tmp_path, **({} if as_file else {"chat_template": CHAT}))
    if as_file:
        (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    ours, theirs = plain(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for answered in (True, False):
        told = {"tools": tools, "tokenize": False, "add_generation_prompt": answered}
        assert ours.apply_chat_template(MESSAGES, **told) == theirs.apply_chat_template(
            MESSAGES, **told
        )
    assert ours.get_chat_template() == CHAT


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"clean_up_tokenization_spaces": True},
        {"add_bos_token": True},
        {"bos_token": "<none>"},
        {"bos_token": {"content": "<s>"}},
        {"chat_template": [{"name": "default", "template": "x"}]},
    ],
)
def test_what_asks_for_more_is_left_to_transformers(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    assert plain_tokenizer(written(tmp_path, **settings), "llama", lambda: None) is None


def test_other_files_and_families_are_left_to_transformers(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert plain_tokenizer(folder, "qwen2", lambda: None) is None
    assert plain_tokenizer(folder, None, lambda: None) is None
    (folder / "added_tokens.json").write_text("{}")
    assert plain_tokenizer(folder, "llama", lambda: None) is None
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer.json").write_text("{")
    assert plain_tokenizer(folder, "llama", lambda: None) is None


def test_all_else_is_asked_of_transformers(tmp_path: Path) -> None:
    folder = written(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = plain_tokenizer(folder, "llama", lambda: theirs)
    assert ours is not None
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("user")["input_ids"] == theirs("user")["input_ids"]
    assert ours.encode("ab", max_length=1, truncation=True) == theirs.encode("a")
    assert ours.decode([[1], [2]]) == theirs.decode([[1], [2]])


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(TemplateError, match="no system"):
        render_template("{{ raise_exception('no system') }}", MESSAGES, None, {}, answered=True)


def test_transformers_and_torch_are_not_imported(tmp_path: Path) -> None:
    written(tmp_path)
    code = (
        "import sys; from pathlib import Path;"
        "from infopt.core.artifact.plain_tokenizer import plain_tokenizer as p;"
        f"t = p(Path({str(tmp_path)!r}), 'llama', None); t.encode('user');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
