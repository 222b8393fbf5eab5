"""Named devices, a config alone, what-ifs, and settings that contradict each other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from infopt.core.artifact.locate import bare_config
from infopt.core.errors import UnsupportedError, UsageError
from infopt.core.profiling.profile import profile
from infopt.core.profiling.stored import runtime_format, stored_bits
from infopt.core.recipe.profile import ProfileSettings
from infopt.core.reports.profile import ProfileReport

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "llama-70b" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA_70B))
    return file


def static(config: Path, **values: Any) -> ProfileReport:
    settings = {"static": True, "device": "H100 SXM", "context": 4096} | values
    artifact = bare_config(str(config))
    assert artifact is not None
    return profile(artifact, ProfileSettings.model_validate(settings))


def test_a_config_alone_is_enough(config: Path) -> None:
    for word in (config, config.parent):
        report = static(word)
        assert report.model is not None and report.model.parameters == 70_553_706_496
        assert report.model.name == "llama-70b"
        assert not report.static.fits and report.static.largest_batch == 0
        assert report.provenance["static.device_memory_bytes"] == "datasheet"
        assert report.provenance["static.predicted"] == "assumed"


def test_what_if_the_weights_took_four_bits(config: Path) -> None:
    report = static(config, weight_bits=4.25)
    layers = 70_553_706_496 - 2 * 128256 * 8192
    expected = layers * 4.25 / 8 + 2 * 2 * 128256 * 8192
    assert report.static.weight_bytes == pytest.approx(expected, rel=0.001)
    assert report.static.fits and report.static.largest_batch > 1
    plain = static(config)
    assert plain.static.predicted is not None and report.static.predicted is not None
    assert report.static.predicted.tpot_s < 0.35 * plain.static.predicted.tpot_s


def test_a_config_that_is_quantized(config: Path) -> None:
    table = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config.write_text(json.dumps({**LLAMA_70B, "quantization_config": table}))
    supposed = static(config).static.weight_bytes
    config.write_text(json.dumps(LLAMA_70B))
    assert supposed == static(config, weight_bits=4 + 20 / 128).static.weight_bytes


@pytest.mark.parametrize(
    ("table", "bits", "word"),
    [
        (None, None, "dense"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 64}, 3 + 19 / 64, "W3A16"),
        ({"quant_method": "awq", "w_bit": 4, "group_size": 128}, 4 + 20 / 128, "W4A16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 16384, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8 + 32 / 4096, "bitsandbytes"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {
                        "weights": {"num_bits": 8, "type": "int", "symmetric": True},
                        "input_activations": {"num_bits": 8},
                    }
                },
            },
            8 + 16 / 4096,
            "W8A8-int8",
        ),
    ],
)
def test_bits_and_formats_by_a_config(table: Any, bits: float | None, word: str) -> None:
    assert stored_bits(table) == (None if bits is None else pytest.approx(bits))
    assert runtime_format(table) == word


def test_devices_that_are_not_known_or_sold_in_sizes(config: Path) -> None:
    with pytest.raises(UnsupportedError, match="no datasheet is known for the device 'A10H'"):
        static(config, device="A10H")
    with pytest.raises(UsageError, match="memories of several sizes"):
        static(config, device="Apple M4")
    report = static(config, device="Apple M4", device_memory_gb=200.0)
    assert report.static.device_memory_bytes == 200 * 10**9
    assert any("not known" in w or "is known" in w for w in report.warnings) or (
        report.static.predicted is not None
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"static": True, "mfu": True}, "leave out what measures"),
        ({"device": "H100 SXM"}, "it goes with static"),
        ({"device_memory_gb": 4.0}, "goes with a device by its name"),
        ({"mbu": True, "weight_bits": 4.0}, "they suppose|suppose"),
        ({"context": 40, "prompt_tokens": 30, "output_tokens": 30}, "together"),
        ({"context": 40, "prompt_tokens": 39}, "no room"),
    ],
)
def test_settings_that_contradict_each_other(values: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        ProfileSettings.model_validate(values)


def test_a_context_stands_for_the_prompt() -> None:
    settings = ProfileSettings(context=4096)
    assert (settings.prompt_tokens, settings.output_tokens) == (4064, 32)
    assert ProfileSettings(context=10).prompt_tokens == 1
    assert ProfileSettings(context=100, prompt_tokens=60).output_tokens == 40
    again = ProfileSettings.model_validate(settings.model_dump())
    assert again == settings


def test_the_guides_cache_through_the_command(tmp_path: Path) -> None:
    """Llama-2-7B: 4,096 tokens take 2.15 GB, a batch of 32 takes 68.7 GB; nothing heavy loads."""
    config = {
        **LLAMA_70B, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = [
        "profile", str(tmp_path), "--kv", "--context", "4096", "--dtype", "float16", "--json", "-",
        "--quiet",
    ]  # fmt: skip
    code = f"""
import sys
from infopt.cli.main import run_app
code = run_app({words!r} + sys.argv[1:])
assert not {{"torch", "transformers"}} & set(sys.modules)
raise SystemExit(code)
"""
    for batch, told in (("1", 2_147_483_648), ("32", 68_719_476_736)):
        command = [sys.executable, "-c", code, "--batch", batch]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["kv_cache"]["bytes"] == told
