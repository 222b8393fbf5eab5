"""Quantize a model that is larger than the memory the process may have.

python docs/results/larger_than_memory.py [--limit-mib 2000] [--layers 28] [--method gptq]

Makes a Llama of random weights in bfloat16 (the default model's tokenizer and vocabulary), a shard
a block, in a scratch folder; quantizes it in a process whose data (RLIMIT_DATA: heap and private
mappings; files mapped for reading are not counted, the system drops them at will) may not exceed
the limit; prints the model's bytes, the limit and the peak of data and of resident memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
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

    def write(name: str, tensors: dict[str, Any]) -> int:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    around = {"model.embed_tokens": noise(vocabulary, HIDDEN), "model.norm": ones}
    around["lm_head"] = noise(vocabulary, HIDDEN)
    total = write("model-outside.safetensors", {f"{k}.weight": v for k, v in around.items()})
    for layer in range(layers):
        block = {name: noise(*shape) for name, shape in shapes.items()}
        block |= {"input_layernorm": ones, "post_attention_layernorm": ones.clone()}
        named = {f"model.layers.{layer}.{name}.weight": value for name, value in block.items()}
        total += write(f"model-{layer:02d}.safetensors", named)
    table = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    return total


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts of a process now."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit-mib", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scratch", type=Path, help="a folder for some 10 GB")
    given = parser.parse_args()
    limit = given.limit_mib * 2**20
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        model, output = Path(scratch) / "large", Path(scratch) / "quantized"
        nbytes = make_model(model, given.layers)
        infopt = Path(sys.executable).parent / "infopt"
        text = ["--samples", "8", "--sequence-length", "256", "--offload", "disk"]
        words = ["quantize", str(model), "--method", given.method, *text]
        command = [str(infopt), *words, "--output", str(output), "--quiet"]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        most = 0
        while process.poll() is None:
            most = max(most, data_bytes(process.pid))
            time.sleep(0.05)
        if process.returncode:
            return process.returncode
        resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        rows = {
            "model": nbytes,
            "limit of data": limit,
            "peak of data": most,
            "peak resident": resident,
            "quantized": json.loads((output / "report.json").read_text())["bytes"],
        }
        for name, value in rows.items():
            sys.stdout.write(f"{name:14} {value / 1e9:6.2f} GB\n")
        sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
