"""A GPT-2 as llama.cpp's GGUF file: `python -m bench.gguf_model MODEL OUTPUT TYPE` in the environment of llama.cpp.

Names and layouts are those of llama.cpp's own converter; the file has no tokenizer, as the benchmarks hand over tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "int8": gguf.GGMLQuantizationType.Q8_0}
TENSORS = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def convert(model: Path, output: Path, quantization: gguf.GGMLQuantizationType) -> None:
    """Writes the matrices of a model in the given type, and the rest in float32."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(output, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    for name, weight in load_file(model / "model.safetensors").items():
        layer, part, kind = _split(name.removeprefix("transformer."))
        if part not in TENSORS:  # a causal mask, or the last layer's matrix, which is that of the token embeddings
            continue
        array = weight.T if ".c_" in name and weight.ndim == 2 else weight  # GPT-2's Conv1D is [in, out]
        array = np.ascontiguousarray(array, np.float32)
        chosen = quantization if array.ndim == 2 and part != "wpe" else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, chosen)
        writer.add_tensor(f"{layer}{TENSORS[part]}.{kind}", data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(name: str) -> tuple[str, str, str]:
    """`h.3.attn.c_proj.bias` as `blk.3.`, `attn.c_proj` and `bias`."""
    part, _, kind = name.rpartition(".")
    if not part.startswith("h."):
        return "", part, kind
    _, layer, rest = part.split(".", 2)
    return f"blk.{layer}.", rest, kind


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), TYPES[sys.argv[3]])
