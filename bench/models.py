"""The models that are measured: one GPT-2 in every form that a runner loads."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from export.to_onnx import export
from qa_onnx.bundle import Bundle
from qa_onnx.kernels import find_kernels

SEED = 0
ROOT = Path(__file__).parent.parent


def random_gpt2(directory: Path, tokenizer: Path) -> None:
    """Writes a GPT-2 of 124 M parameters with seeded random weights: its speed is that of a trained one."""
    torch.manual_seed(SEED)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    GPT2TokenizerFast.from_pretrained(tokenizer).save_pretrained(directory)


def prepare(directory: Path, model: Path, verify: Path | None = None) -> None:
    """Fills a directory with bundles, Optimum's export and CTranslate2's conversions of a model.

    What is there already stays; a conversion whose package is not installed is left out.

    Args:
        directory: Where to.
        model: Of transformers.
        verify: Questions that int8 is smoothed with.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if model != directory / "model" and not (directory / "model").exists():
        shutil.copytree(model, directory / "model")
    model = directory / "model"
    for precision in ("fp32", "bf16", "int8"):
        if precision == "bf16" and find_kernels(precision).library is None:
            continue
        if (directory / precision).exists():
            continue
        questions = [str(verify)] if verify is not None and precision == "int8" else []
        export(
            str(model), directory / precision, precision=precision, verify=questions, keep_optimum=precision == "fp32"
        )
        Bundle.open(directory / precision).keep({"no_answer": {}, "windows": {}})  # as peers: whole contexts, greedily
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return
    for precision in ("fp32", "int8"):
        output = directory / f"ctranslate2-{precision}"
        if not output.exists():
            quantization = "int8" if precision == "int8" else None
            TransformersConverter(str(model)).convert(str(output), quantization=quantization)


def quantize_for_vllm(directory: Path, _: Path) -> None:
    """Writes the model of a directory as vLLM's W8A8: int8 weights by channel, activations by token at run time.

    The format is compressed-tensors' `int-quantized`; vLLM expects the layout of GPT-2's `Conv1D`, [in, out].
    """
    source, output = directory / "model", directory / "vllm-int8"
    if output.exists():
        return
    shutil.copytree(source, output)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weights[name] = weight
        if weight.ndim == 2 and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
            scales = (weight.abs().amax(0) / 127).clamp(min=1e-8)
            weights[name] = (weight / scales).round().clamp(-127, 127).to(torch.int8)
            weights[f"{name}_scale"] = scales[:, None].contiguous()
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": number | {"strategy": "channel", "dynamic": False},
                "input_activations": number | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=2))


def convert_to_openvino(directory: Path, python: Path) -> None:
    """Converts the model of a directory with the environment of OpenVINO, in fp32 and with int8 weights."""
    for weights in ("fp32", "int8"):
        output = directory / f"openvino-{weights}"
        if not output.exists():
            arguments = ["export", "openvino", "--model", str(directory / "model"), "--weight-format", weights]
            task = ["--task", "text-generation-with-past"]
            subprocess.run([python.with_name("optimum-cli"), *arguments, *task, str(output)], check=True)


def convert_to_gguf(directory: Path, python: Path) -> None:
    """Converts the model of a directory with the environment of llama.cpp, to bf16 and to Q8_0."""
    for precision in ("bf16", "int8"):
        output = directory / f"llama-cpp-{precision}.gguf"
        if not output.exists():
            command = [str(python), "-m", "bench.gguf_model", str(directory / "model"), str(output), precision]
            subprocess.run(command, check=True, cwd=ROOT)
