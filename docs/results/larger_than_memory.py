"""Quantize a model that is larger than the memory that the process takes.

python docs/results/larger_than_memory.py [--layers 36] [--method gptq] [--scratch FOLDER]

Makes a Llama of random weights in bfloat16 (the default model's tokenizer and vocabulary) in a
scratch folder, quantizes it with the hidden states on disk, and prints the model's bytes and the
peaks of the process: of all its resident memory, and of that part which no file backs and the
system therefore cannot drop. Limits of address space (RLIMIT_DATA, RLIMIT_AS) say nothing here:
safetensors maps a whole file for each tensor of it.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, HEADS, GROUPS = 2048, 5632, 32, 8


def make_model(folder: Path, layers: int) -> int:
    """Write the model, one block in memory at a time; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    from infopt.core.artifact.locate import locate

    default = locate(None)
    vocabulary = int(default.config["vocab_size"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    default.tokenizer().save_pretrained(folder)
    narrow = HIDDEN // HEADS * GROUPS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    index: dict[str, str] = {}

    def write(name: str, tensor: Any) -> int:
        file = f"{name}.safetensors"
        save_file({f"{name}.weight": tensor}, folder / file, metadata={"format": "pt"})
        index[f"{name}.weight"] = file
        return int(tensor.nbytes)

    total = write("model.norm", ones)
    for name in ("model.embed_tokens", "lm_head"):
        total += write(name, noise(vocabulary, HIDDEN))
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            total += write(f"{block}.{name}", ones)
        for name, shape in shapes.items():
            total += write(f"{block}.{name}", noise(*shape))
    table = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return total


def memory_of(pid: int) -> int:
    """Resident bytes of a process that no file backs; 0 once it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scratch", type=Path, help="a folder for some 10 GB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        model, output = Path(scratch) / "large", Path(scratch) / "quantized"
        nbytes = make_model(model, given.layers)
        infopt = Path(sys.executable).parent / "infopt"
        text = ["--samples", "8", "--sequence-length", "256", "--offload", "disk"]
        words = ["quantize", str(model), "--method", given.method, *text]
        command = [str(infopt), *words, "--output", str(output), "--quiet"]
        started = time.monotonic()
        process = subprocess.Popen(command)
        most = 0
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.05)
        if process.returncode:
            return process.returncode
        resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        rows = {
            "model": nbytes,
            "peak resident": resident,
            "of no file": most,
            "quantized": json.loads((output / "report.json").read_text())["bytes"],
        }
        for name, value in rows.items():
            sys.stdout.write(f"{name:14} {value / 1e9:6.2f} GB\n")
        sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
