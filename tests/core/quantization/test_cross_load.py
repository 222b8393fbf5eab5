"""Our GPTQ files in other hands: transformers with gptqmodel."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from infopt.core.artifact.read import Artifact, read_artifact
from infopt.core.models.hf import load_transformers
from infopt.core.quantization.quantize import quantize
from infopt.core.recipe.quantize import QuantizeSettings

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


def elsewhere(path: Path, out: Path) -> dict[str, Tensor]:
    """What transformers with gptqmodel makes of the artifact, in a process of its own."""
    environment = os.environ | {
        "GPTQMODEL_CPU_WORKERS": "2",  # it fails on few cores without
        "TORCHDYNAMO_DISABLE": "1",  # compiling each layer takes minutes
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(out), PROMPT, str(NEW_TOKENS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="needs gptqmodel and optimum: pip install 'infopt[compat]'",
)
def test_gptqmodel_computes_what_we_do(default_artifact: Artifact, tmp_path: Path) -> None:
    settings = QuantizeSettings(method="rtn", group_size=64, device="cpu", dtype="float32")
    quantize(default_artifact, tmp_path / "out", settings)
    theirs = elsewhere(tmp_path / "out", tmp_path / "found.safetensors")

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
