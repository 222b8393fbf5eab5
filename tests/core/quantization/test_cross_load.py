"""Their checkpoints in our hands, ours in theirs: the same logits, as far as each tool computes so.

What the other tools make of a checkpoint on a CPU, and in which way they are less than exact:

compressed-tensors   float32, inputs and KV cache rounded as we do: equal
gptqmodel, gptq      weights rounded to float16 (backend torch): equal, after that
gptqmodel, awq       weights, inputs and outputs in float16
transformers, fp8    weights dequantized, inputs not rounded at all: equal, after that
bitsandbytes, nf4    equal
bitsandbytes, int8   inputs in float16, columns with outliers left as they are for the whole batch,
                     where we leave single values: equal layer by layer, after that

"Equal" allows what another machine's order of additions makes of float32. Where inputs are rounded
that can move a value to the next step of their grid, so there the bound is wider; leaving the
rounding out would cost 5% and more.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from infopt.core.artifact.quantized import is_quantized, layer_scheme, linear_weight
from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.conversion.convert import convert
from infopt.core.formats.activation import round_inputs
from infopt.core.models.hf import load_transformers
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.convert import ConvertSettings
from infopt.core.recipe.quantize import QuantizeSettings

FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = FIXTURES / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
EXACT = 1e-5
STEPPED = 5e-3
HALF = 3e-3
"""Relative differences of the logits: of float32, of rounded inputs, of float16 products."""
needs_others = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("gptqmodel", "optimum", "bitsandbytes")),
    reason="needs gptqmodel, optimum and bitsandbytes: pip install 'infopt[compat]'",
)
ENVIRONMENT = {
    "GPTQMODEL_CPU_WORKERS": "2",  # it fails on few cores without
    "TORCHDYNAMO_DISABLE": "1",  # compiling each layer takes minutes
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(folder: Path) -> None:
    """Hold what we compute to what the other tool computed from the same folder."""
    artifact = read_artifact(folder)
    expected = load_file(folder / "expected.safetensors")
    assert artifact.quantization is not None
    method = artifact.quantization["quant_method"]
    model = load_transformers(artifact, torch.float32, torch.device("cpu"))
    layers = {n: m for n, m in model.named_modules() if is_quantized(artifact, n)}
    assert len(layers) == 14
    rounding = any(scheme_rounds(artifact, name) for name in layers)
    match method:
        case "gptq":
            as_half(layers, weights=True)
        case "awq":
            as_half(layers, weights=True, inputs=True, outputs=True)
        case "fp8":
            for layer in layers.values():
                layer._forward_pre_hooks.clear()
    with torch.no_grad():
        found = relative(model(expected["ids"]).logits, expected["logits"])
    if method == "bitsandbytes" and rounding:
        compare_int8_layers(artifact, expected)
        assert found < 0.05
    elif method == "awq":
        assert found < HALF
    else:
        stepped = method == "compressed-tensors" and (rounding or "kv" in folder.name)
        assert found < (STEPPED if stepped else EXACT)


def scheme_rounds(artifact: Artifact, layer: str) -> bool:
    scheme = layer_scheme(artifact, layer)
    return scheme is not None and scheme.activation is not None


def as_half(
    layers: dict[str, nn.Module],
    *,
    weights: bool,
    inputs: bool = False,
    outputs: bool = False,
) -> None:
    """Let layers of float32 compute as a kernel of float16 would."""

    def half(x: Tensor) -> Tensor:
        return x.to(torch.float16).to(torch.float32)

    for layer in layers.values():
        if weights:
            layer.weight.copy_(half(layer.weight))
        if inputs:
            layer.register_forward_pre_hook(lambda _, args: (half(args[0]),), prepend=True)
        if outputs:
            layer.register_forward_hook(lambda _, args, out: half(out))


def compare_int8_layers(artifact: Artifact, expected: dict[str, Tensor]) -> None:
    """With the outliers of whole columns left as they are, bitsandbytes' products are ours."""
    names = sorted({n.rpartition(".")[0] for n in expected if n.endswith(".input")})
    assert len(names) == 2
    for name in names:
        scheme, weight = layer_scheme(artifact, name), linear_weight(artifact, name)
        assert scheme is not None and scheme.activation is not None
        assert scheme.activation.outlier_threshold == 6.0 and not isinstance(weight, Tensor)
        x = expected[f"{name}.input"]
        rounded = x.to(torch.float16).to(torch.float32)
        columns = (rounded.abs() >= scheme.activation.outlier_threshold).any(dim=1, keepdim=True)
        assert bool(columns.any())
        inputs = torch.where(columns, x, round_inputs(rounded, scheme.activation))
        theirs = expected[f"{name}.output"]
        assert relative(inputs @ weight.dequantize().T, theirs) < 1e-4
        assert relative(x @ weight.dequantize().T, theirs) > 1e-3, "the rounding is seen"


def elsewhere(*folders: Path) -> None:
    """Let transformers with the tool of each folder's format write what it computes from it."""
    done = subprocess.run(
        [sys.executable, str(FIXTURES / "make_checkpoints.py"), "--expect", *map(str, folders)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_we_compute_what_the_tool_that_wrote_it_does(name: str) -> None:
    compare(CHECKPOINTS / name)


CONVERTED = (
    ("ct-w4a16", "gptq"),
    ("ct-w4a16-asym", "gptq"),
    ("awq-zero-point", "gptq"),
    ("gptq-act-order", "gptq"),
    ("gptq-asym", "awq"),
    ("ct-w4a16", "awq"),
    ("gptq-asym", "compressed-tensors"),
    ("awq", "compressed-tensors"),
    ("ct-w8a8", "compressed-tensors"),
    ("ct-fp8", "compressed-tensors"),
    ("ct-fp8-dynamic", "compressed-tensors"),
    ("ct-fp8-block", "compressed-tensors"),
    ("ct-kv-fp8", "compressed-tensors"),
    ("ct-fp8-block", "fp8"),
    ("bnb-int8", "bitsandbytes"),
    ("bnb-nf4", "bitsandbytes"),
)


@pytest.mark.slow
@needs_others
def test_others_compute_what_we_do_from_what_we_converted(tmp_path: Path) -> None:
    """All formats that we write; in one process, since its libraries take long to import."""
    folders = []
    for name, format in CONVERTED:
        folder = tmp_path / f"{name}--{format}"
        settings = ConvertSettings.model_validate({"format": format})
        assert convert(read_artifact(CHECKPOINTS / name), folder, settings).exact
        folders.append(folder)
    elsewhere(*folders)
    for folder in folders:
        compare(folder)


QUANTIZED: dict[str, dict[str, Any]] = {
    "gptq-w4": {"method": "gptq", "group_size": 32},
    "gptq-w4-asym": {"method": "gptq", "group_size": 32, "symmetric": False},
    "rtn-w8": {"method": "rtn", "bits": 8, "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
    "rtn-ct": {"method": "rtn", "group_size": 32, "format": "compressed-tensors"},
    "smoothquant": {"method": "smoothquant"},
    "fp8-dynamic": {"method": "fp8"},
    "fp8-static": {"method": "fp8", "fp8": "static"},
    "fp8-block": {"method": "fp8", "fp8": "block"},
    "kv-fp8": {"method": "rtn", "bits": 8, "kv_cache": "fp8"},
    "llm-int8": {"method": "llm-int8"},
    "nf4": {"method": "nf4"},
}


@pytest.mark.slow
@needs_others
def test_others_compute_what_we_do_from_what_we_quantized(tmp_path: Path) -> None:
    """Each method's checkpoint, from the door to the other tool's logits."""
    model = tmp_path / "model"
    made = "import sys, make_checkpoints; from pathlib import Path; "
    made += "make_checkpoints.base(Path(sys.argv[1]), wide=True)"
    subprocess.run([sys.executable, "-c", made, str(model)], cwd=FIXTURES, check=True)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i % 97} is number {i * i % 1009}." for i in range(500)))
    calibration = {"text": str(text), "samples": 8, "sequence_length": 64}
    folders = []
    for name, words in QUANTIZED.items():
        settings = QuantizeSettings.model_validate(
            {"calibration": calibration, "device": "cpu", "dtype": "float32", **words}
        )
        quantize(read_artifact(model), tmp_path / name, settings)
        folders.append(tmp_path / name)
    elsewhere(*folders)
    for folder in folders:
        compare(folder)


PROMPT = "The capital of France is"
NEW_TOKENS = 12
# In float32 with its plain backend gptqmodel computes as we do. What it picks by itself on a CPU
# for 4 bits is an int4 kernel that rounds activations to bfloat16 whatever the dtype asked for.
RUN = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
path, out, prompt, new = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt").input_ids
found = {}
for backend in ("torch", "auto"):
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map="cpu",
        quantization_config=GPTQConfig(bits=4, backend=backend),
    )
    layer = type(model.get_submodule("model.layers.0.mlp.up_proj"))
    assert layer.__module__.startswith("gptqmodel"), layer
    with torch.no_grad():
        found[f"{backend}.logits"] = model(ids).logits.float().contiguous()
        found[f"{backend}.text"] = model.generate(ids, max_new_tokens=int(new), do_sample=False)
save_file(found, out)
"""


@pytest.mark.slow
@needs_others
def test_gptqmodel_writes_the_text_that_we_do(default_artifact: Artifact, tmp_path: Path) -> None:
    settings = QuantizeSettings(method="rtn", group_size=64, device="cpu", dtype="float32")
    quantize(default_artifact, tmp_path / "out", settings)
    out = tmp_path / "found.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "out"), str(out), PROMPT, str(NEW_TOKENS)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(out)

    written = read_artifact(tmp_path / "out")
    model = load_transformers(written, torch.float32, torch.device("cpu"))
    ids = torch.tensor([written.tokenizer()(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
        text = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert float((theirs["torch.logits"] - logits).abs().max()) < 1e-2
    assert torch.equal(theirs["torch.text"], text)
    rough = theirs["auto.logits"] - logits
    assert float(rough.norm() / logits.norm()) < 0.05
    assert torch.equal(theirs["auto.text"], text)
