"""int8: which products of a model can be done in it, and what that costs beside fp32.

Weights have one scale a column and activations one scale a row (`export/decoder.py`), both symmetric: "vector-wise
quantization" in LLM.int8() (Dettmers et al. 2022). A product whose activations have outliers loses too much that way;
calibration finds those and leaves them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from export.decoder import OUTPUT_WEIGHTS, POSITION_EMBEDDING, TOKEN_EMBEDDING, QuantizedWeight
from qa_onnx.config import GenerationConfig
from qa_onnx.data.example import Example
from qa_onnx.engine.engine import Engine
from qa_onnx.engine.scheduler import Generation, generate
from qa_onnx.engine.sequence import Prompt
from qa_onnx.evaluation.metrics import evaluate

LARGEST = 127
MAX_PRODUCT_ERROR = 0.05
"""The most that a product in int8 may differ from the one in float32, relative to its size (root mean square). That of
two matrices of normal random numbers differs by about 0.01."""
CALIBRATION_TOKENS = 64
"""Tokens of each prompt, its last ones, that calibration looks at."""
MAX_NEW_TOKENS = 32
BATCH_SIZE = 16


def quantize(matrix: np.ndarray) -> QuantizedWeight:
    """Rounds float32 [K, N] to int8 with one scale a column."""
    scales = np.maximum(np.abs(matrix).max(axis=0) / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    return QuantizedWeight(values=np.round(matrix / scales).astype(np.int8), scales=scales)


def quantize_weights(
    model: GPT2LMHeadModel, weights: Mapping[str, np.ndarray], prompts: Sequence[Prompt]
) -> tuple[dict[str, QuantizedWeight], dict[str, float]]:
    """Quantises every matrix whose product keeps within `MAX_PRODUCT_ERROR` on some prompts.

    Args:
        model: In evaluation mode, float32, on the CPU.
        weights: Of the same model, from `export.decoder.weights_of`.
        prompts: What the products are measured on; each gets what it gets in the float32 model.

    Returns:
        The quantised matrices, for `build_decoder`, and the relative errors of those that stay float32.
    """
    output = OUTPUT_WEIGHTS if OUTPUT_WEIGHTS in weights else TOKEN_EMBEDDING
    matrices = {
        name: matrix.T if name == output else matrix
        for name, matrix in weights.items()
        if matrix.ndim == 2 and name != POSITION_EMBEDDING and (name == output or name != TOKEN_EMBEDDING)
    }
    quantized = {name: quantize(matrix) for name, matrix in matrices.items()}
    errors = _product_errors(model, output, matrices, quantized, prompts)
    kept = {name: error for name, error in errors.items() if error > MAX_PRODUCT_ERROR}
    return {name: matrix for name, matrix in quantized.items() if name not in kept}, kept


@torch.inference_mode()
def _product_errors(
    model: GPT2LMHeadModel,
    output: str,
    matrices: Mapping[str, np.ndarray],
    quantized: Mapping[str, QuantizedWeight],
    prompts: Sequence[Prompt],
) -> dict[str, float]:
    """Relative error of each product in int8 over the last tokens of all prompts."""
    squares = {name: np.zeros(2) for name in matrices}

    def measure(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        exact_weight = torch.tensor(matrices[name])
        weight = torch.from_numpy(quantized[name].values * quantized[name].scales)

        def compare(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden = inputs[0].flatten(end_dim=-2)[-CALIBRATION_TOKENS:]
            scales = hidden.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / LARGEST
            exact = hidden @ exact_weight
            error = torch.round(hidden / scales) * scales @ weight - exact
            squares[name] += [float(error.square().sum()), float(exact.square().sum())]

        return compare

    handles = []
    for name in matrices:
        module = model.lm_head if name == output else model.transformer.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(measure(name)))
    try:
        for prompt in prompts:
            model(torch.tensor([prompt.ids]), use_cache=False, logits_to_keep=CALIBRATION_TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(np.sqrt(error / max(size, 1e-30))) for name, (error, size) in squares.items()}


def measure_loss(
    reference: Engine, engine: Engine, prompts: Sequence[Prompt], examples: Sequence[Example], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Lets two engines answer the same prompts and compares the answers.

    Args:
        reference: In fp32.
        engine: In the precision to report on.
        prompts: The prompts.
        examples: The questions that the first of the prompts ask, with their gold answers; may be none.
        tokenizer: Turns tokens into text.

    Returns:
        Shares of equal answers and of equal tokens in percent (tokens at the same place of an answer; a token that only
        one of the two has is not equal), and, where there are examples, exact match and F1 of both and `f1_drop`.
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
