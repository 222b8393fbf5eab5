from pathlib import Path
from typing import Any

import pytest
import torch

from infopt.core.artifact.read import Artifact
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.text.sources import Text, calibration_text, evaluation_text
from infopt.core.text.windows import default_prefix, token_stream, token_windows


@pytest.fixture(scope="module")
def tokenizer(default_artifact: Artifact) -> Any:
    return default_artifact.tokenizer()


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(50)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def words(count: int) -> Text:
    return Text("words", (" ".join(f"w{i % 50}" for i in range(count)),), "none", "0")


def test_the_default_calibration_fits_its_default_size(tokenizer: Any) -> None:
    text = calibration_text("default")
    windows = token_windows(text, tokenizer, length=512, count=128, seed=0, chat=False)
    assert windows.shape == (128, 512) and windows.dtype == torch.int64
    assert len(token_stream(evaluation_text("default"), tokenizer, chat=False)) >= 40_000


def test_windows_do_not_overlap_and_follow_the_seed(with_bos: Any) -> None:
    text = Text("t", (" ".join(f"w{i}" for i in range(50)),), "none", "0")
    made = [token_windows(text, with_bos, length=8, count=6, seed=s, chat=False) for s in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    body = made[0][:, 1:].flatten().tolist()
    assert len(set(body)) == len(body) == 6 * 7
    assert all(row == sorted(row) for row in made[0].tolist())


def test_too_short_a_text_says_what_it_holds(with_bos: Any) -> None:
    assert len(token_windows(words(70), with_bos, length=8, count=10, seed=0, chat=False)) == 10
    with pytest.raises(UsageError, match="70 tokens: enough for 10 windows of 8, not 11"):
        token_windows(words(70), with_bos, length=8, count=11, seed=0, chat=False)
    with pytest.raises(UsageError, match="enough for 0 windows"):
        token_windows(words(3), with_bos, length=8, count=1, seed=0, chat=False)
    with pytest.raises(UsageError, match="no room"):
        token_windows(words(3), with_bos, length=1, count=1, seed=0, chat=False)


def test_bos_only_where_the_tokenizer_adds_it(tokenizer: Any, with_bos: Any) -> None:
    assert default_prefix(tokenizer) == [] and default_prefix(with_bos) == [0]
    windows = token_windows(words(70), with_bos, length=8, count=4, seed=0, chat=False)
    assert windows[:, 0].tolist() == [0] * 4 and not (windows[:, 1:] == 0).any()
    stream = token_stream(words(20), with_bos, chat=False)
    assert stream[0] == 0 and len(stream) == 21 and stream.tolist().count(0) == 1


def test_stream_joins_and_limits(tokenizer: Any) -> None:
    text = Text("t", ("One two.", "Three."), "none", "0")
    stream = token_stream(text, tokenizer, chat=False)
    assert tokenizer.decode(stream) == "One two.\n\nThree."
    assert torch.equal(token_stream(text, tokenizer, chat=False, limit=3), stream[:3])


def test_chat_renders_each_document(tokenizer: Any) -> None:
    text = Text("t", ("One.", "\n\nTwo.", "x" * 1500 + "\n\n" + "y" * 1500), "none", "0")
    found = tokenizer.decode(token_stream(text, tokenizer, chat=True))
    assert found.count("<|im_start|>user\n") == 4
    assert "<|im_start|>user\nOne.<|im_end|>" in found and "Two.<|im_end|>" in found


def test_chat_keeps_the_roles_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}'
    )
    text = calibration_text(str(file))
    found = tokenizer.decode(token_stream(text, tokenizer, chat=True))
    assert found.endswith("user\nQ?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n")
    assert tokenizer.decode(token_stream(text, tokenizer, chat=False)) == "Q?\n\nA."


def test_chat_without_a_template(with_bos: Any) -> None:
    with pytest.raises(UnsupportedError, match="no chat template"):
        token_stream(words(5), with_bos, chat=True)
