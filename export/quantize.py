"""int8 quantization: which matmuls of a model can run in int8, and what a precision loses compared with fp32.

Weights have one scale per column and activations one scale per row: "vector-wise quantization" in LLM.int8() (Dettmers
et al. 2022). Activation channels with outliers are smoothed first, and a matmul that still loses too much stays in
float32; calibration on some prompts decides both. (In the graph with kernels each row of activations also has a zero
point, in the plain graph it has none: see `export/decoder.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from export.weights import OUTPUT_WEIGHTS, POSITION_EMBEDDING, TOKEN_EMBEDDING, QuantizedWeight
from qa_onnx.config import GenerationConfig
from qa_onnx.data.example import Example
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.scheduler import Generation, generate
from qa_onnx.engine.sequence import Prompt
from qa_onnx.evaluation.metrics import evaluate

LARGEST = 127
MAX_MATMUL_ERROR = 0.05
"""Maximum error of a matmul in int8, relative to its float32 result (root mean square). That of two matrices of normal
random numbers is about 0.01."""
CALIBRATION_TOKENS = 24
"""The last tokens of each prompt, whose activations calibration uses."""
ALPHAS = (0.5, 0.6, 0.7, 0.8)
"""Smoothing strengths to try: how much of the range moves from activations to weights; 0 is none of it, 1 all."""
LEVELS, SMALLEST = 255, 1e-20
MAX_NEW_TOKENS = 32
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A model whose matmuls are in int8 where their error is small.

    Attributes:
        weights: The model's weights, float32, smoothed; they compute the same function.
        matrices: The int8 weights, by the names of the float32 ones that they replace.
        kept: Relative errors, by name, of the matmuls that stay float32.
        alphas: How much each matmul's input was smoothed, by name; inputs without an entry were not.
    """

    weights: dict[str, np.ndarray]
    matrices: dict[str, QuantizedWeight]
    kept: dict[str, float]
    alphas: dict[str, float]


def quantize(matrix: np.ndarray) -> QuantizedWeight:
    """Rounds float32 [K, N] to int8 with one scale per column."""
    scales = np.maximum(np.abs(matrix).max(axis=0) / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    return QuantizedWeight(values=np.round(matrix / scales).astype(np.int8), scales=scales)


def quantize_model(
    model: GPT2LMHeadModel,
    weights: Mapping[str, np.ndarray],
    prompts: Sequence[Prompt],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> QuantizedModel:
    """Quantizes every matrix whose matmul has an error of at most `MAX_MATMUL_ERROR` on some prompts.

    Inputs with outliers are smoothed first (SmoothQuant, Xiao et al. 2023): channel k of an input is divided by
    s_k = max|x_k|^alpha / max|W_k|^(1 - alpha), and row k of its matrix multiplied by it, which changes no result. The
    division is folded into the layer before: a layer norm, or the values that attention adds up. (The input of
    `mlp.c_proj` is the result of the activation function, and cannot be smoothed.) Each matmul gets the alpha with
    the smallest error.

    Args:
        model: In evaluation mode, float32, on the CPU.
        weights: Of the same model, from `export.weights.extract_weights`.
        prompts: The matmuls are measured on the inputs that these prompts give them in the float32 model.
        alphas: Smoothing strengths to try; without any, nothing is smoothed.
    """
    output = OUTPUT_WEIGHTS if OUTPUT_WEIGHTS in weights else TOKEN_EMBEDDING
    names = [
        name
        for name, matrix in weights.items()
        if matrix.ndim == 2 and name != POSITION_EMBEDDING and (name == output or name != TOKEN_EMBEDDING)
    ]
    inputs = _collect_inputs(model, names, output, prompts)
    smoothed, kept = dict(weights), {}
    chosen: dict[str, tuple[float | None, np.ndarray]] = {}
    for name in names:
        matrix = weights[name].T if name == output else weights[name]
        candidates: dict[float | None, np.ndarray] = {None: np.ones(len(matrix), np.float32)}
        if not name.endswith("mlp.c_proj.weight"):
            candidates |= {alpha: _smoothing(inputs[name], matrix, alpha) for alpha in alphas}
        exact = inputs[name] @ matrix
        errors = {alpha: _matmul_error(inputs[name], matrix, scales, exact) for alpha, scales in candidates.items()}
        alpha = min(errors, key=lambda one: errors[one])
        if errors[alpha] <= MAX_MATMUL_ERROR:
            chosen[name] = alpha, candidates[alpha]
            if alpha is not None:
                _divide_input(smoothed, name, output, candidates[alpha])
        else:  # NaN, too
            kept[name] = errors[alpha]
    matrices = {}
    for name, (alpha, scales) in chosen.items():
        matrix = smoothed[name].T if name == output else smoothed[name]
        matrices[name] = replace(quantize(matrix * scales[:, None]), smoothing=None if alpha is None else scales)
    found = {name: alpha for name, (alpha, _) in chosen.items() if alpha is not None}
    return QuantizedModel(weights=smoothed, matrices=matrices, kept=kept, alphas=found)


def _smoothing(inputs: np.ndarray, matrix: np.ndarray, alpha: float) -> np.ndarray:
    """The factors of the rows of a matrix [K, N], float32 [K]."""
    activation, weight = np.abs(inputs).max(axis=0), np.abs(matrix).max(axis=1)
    scales = np.maximum(activation, SMALLEST) ** alpha / np.maximum(weight, SMALLEST) ** (1 - alpha)
    return np.where((activation > 0) & (weight > 0), scales, 1).astype(np.float32)


def _divide_input(weights: dict[str, np.ndarray], name: str, output: str, scales: np.ndarray) -> None:
    """Divides the channels of a matmul's input by `scales`, in the weights of the layer that computes them."""
    if name.endswith("attn.c_proj.weight"):
        source = name.replace("c_proj.weight", "c_attn")
        width = len(scales)
        for part in ("weight", "bias"):
            changed = weights[f"{source}.{part}"].copy()
            changed[..., 2 * width :] /= scales
            weights[f"{source}.{part}"] = changed
        return
    layer = name.rsplit(".", 3)[0]
    source = "ln_f" if name == output else f"{layer}.{'ln_1' if 'attn' in name else 'ln_2'}"
    for part in ("weight", "bias"):
        weights[f"{source}.{part}"] = weights[f"{source}.{part}"] / scales


def _matmul_error(inputs: np.ndarray, matrix: np.ndarray, scales: np.ndarray, exact: np.ndarray) -> float:
    """The error of a matmul in int8, relative to its exact result (root mean square)."""
    smooth = inputs / scales
    low, high = np.minimum(smooth.min(axis=1), 0), np.maximum(smooth.max(axis=1), 0)
    step = np.maximum((high - low) / LEVELS, SMALLEST)[:, None]
    zero = np.round(-low[:, None] / step)
    rounded = (np.clip(np.round(smooth / step) + zero, 0, LEVELS) - zero) * step
    quantized = quantize(matrix * scales[:, None])
    error = rounded @ (quantized.values * quantized.scales) - exact
    return float(np.sqrt(np.square(error).sum() / max(float(np.square(exact).sum()), SMALLEST)))


def _collect_inputs(
    model: GPT2LMHeadModel, names: Sequence[str], output: str, prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
    """The inputs of each matmul, float32 [rows, K], for the last tokens of some prompts."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def collect(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(end_dim=-2)
            found[name].append(rows[:: max(len(rows) // CALIBRATION_TOKENS, 1)].numpy())

        return keep

    handles = []
    for name in names:
        module = model.lm_head if name == output else model.transformer.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(collect(name)))
    try:
        with torch.inference_mode():
            for prompt in prompts:
                model(torch.tensor([prompt.ids]), use_cache=False, logits_to_keep=CALIBRATION_TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def compare_precisions(
    reference: Engine, engine: Engine, prompts: Sequence[Prompt], examples: Sequence[Example], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Generates answers to the same prompts with two engines, and compares them.

    Args:
        reference: In fp32.
        engine: In the precision to report on.
        prompts: The prompts.
        examples: The questions of the first prompts, with their gold answers; may be none.
        tokenizer: Decodes tokens.

    Returns:
        Percentages of equal answers and of equal tokens (at the same position of an answer; a token that only one of
        the two has counts as different) and, where there are examples, exact match and F1 of both and `f1_drop`.
    """
    expected, got = (
        generate(side, prompts, GenerationConfig(max_new_tokens=MAX_NEW_TOKENS), batch_size=BATCH_SIZE)
        for side in (reference, engine)
    )
    pairs = list(zip(expected, got, strict=True))
    equal_tokens = sum(
        left == right for one, other in pairs for left, right in zip(one.token_ids, other.token_ids, strict=False)
    )
    tokens = sum(max(len(one.token_ids), len(other.token_ids)) for one, other in pairs)
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "equal_answers_percent": 100 * sum(one == other for one, other in pairs) / len(pairs),
        "equal_tokens_percent": 100 * equal_tokens / max(tokens, 1),
    }
    if examples:

        def scores(generations: Sequence[Generation]) -> dict[str, Any]:
            texts = [tokenizer.decode(generation.token_ids).strip() for generation in generations]
            answers = {example.id: text for example, text in zip(examples, texts, strict=False)}
            return evaluate(examples, answers).to_dict()

        before, after = scores(expected), scores(got)
        report |= {
            "questions": len(examples),
            "fp32": before,
            "quantized": after,
            "f1_drop": before["f1"] - after["f1"],
        }
    return report
