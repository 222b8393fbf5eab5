"""The names of a decoder's tensors: GGUF's and Hugging Face's."""

import re

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a Llama's or Qwen's GGUF tensor; None if there is none."""
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    found = _BLOCK_NAME.fullmatch(gguf_name)
    if found is None or found[2] not in _BLOCK:
        return None
    return f"model.layers.{int(found[1])}.{_BLOCK[found[2]]}.{found[3]}"
