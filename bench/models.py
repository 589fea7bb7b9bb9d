"""The models that are measured: one GPT-2 in every form that a runner loads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from export.to_onnx import export
from qa_onnx.kernels import find_kernels

SEED = 0


def random_gpt2(directory: Path, tokenizer: Path) -> None:
    """Writes a GPT-2 of 124 M parameters with seeded random weights: its speed is that of a trained one."""
    torch.manual_seed(SEED)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    GPT2TokenizerFast.from_pretrained(tokenizer).save_pretrained(directory)


def prepare(directory: Path, model: Path) -> None:
    """Fills a directory with bundles, Optimum's export and CTranslate2's conversions of a model.

    What is there already stays; a conversion whose package is not installed is left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if model != directory / "model" and not (directory / "model").exists():
        shutil.copytree(model, directory / "model")
    model = directory / "model"
    for precision in ("fp32", "bf16", "int8"):
        if precision == "bf16" and find_kernels(precision).library is None:
            continue
        if not (directory / precision).exists():
            export(str(model), directory / precision, precision=precision, keep_optimum=precision == "fp32")
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        return
    for precision in ("fp32", "int8"):
        output = directory / f"ctranslate2-{precision}"
        if not output.exists():
            quantization = "int8" if precision == "int8" else None
            TransformersConverter(str(model)).convert(str(output), quantization=quantization)


def convert_to_openvino(directory: Path, python: Path) -> None:
    """Converts the model of a directory with the environment of OpenVINO, in fp32 and with int8 weights."""
    for weights in ("fp32", "int8"):
        output = directory / f"openvino-{weights}"
        if not output.exists():
            arguments = ["export", "openvino", "--model", str(directory / "model"), "--weight-format", weights]
            task = ["--task", "text-generation-with-past"]
            subprocess.run([python.with_name("optimum-cli"), *arguments, *task, str(output)], check=True)
