"""Answers of PyTorch and of the bundle to the same questions, one by one: `python -m bench.accuracy --help`."""

from __future__ import annotations

import training.packages  # noqa: F401

# isort: split
import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from bench.harness import publish
from bench.machine import describe_machine
from qa_onnx import Answerer, EngineConfig
from qa_onnx.bundle import Bundle
from qa_onnx.cli import add_data_options, positive, read_data, run_command
from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import evaluate
from qa_onnx.files import check_outputs
from qa_onnx.text.prompt import encode_prompts
from training.evaluation import generate_answers
from training.model import load_model

EXIT_DIFFERENT = 1
TIE_MARGIN = 1e-4
"""Where PyTorch's two best logits are closer than this, either token is a right answer of the same arithmetic."""


@torch.inference_mode()
def smallest_margin(
    model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast, example: Example, *, max_new_tokens: int
) -> float:
    """Answers one question with PyTorch, alone; returns the smallest lead of a chosen token over the runner-up."""
    prompt = encode_prompts(tokenizer.backend_tokenizer, [example.question], [example.context])[0]
    tokens = torch.tensor([prompt.ids])
    past, margin = None, float("inf")
    for _ in range(min(max_new_tokens, model.config.n_positions - len(prompt) + 1)):
        output = model(tokens, past_key_values=past, use_cache=True)
        best, second = output.logits[0, -1].topk(2).values.tolist()
        margin, past = min(margin, best - second), output.past_key_values
        tokens = output.logits[:, -1:].argmax(-1)
        if tokens.item() == tokenizer.eos_token_id:
            break
    return margin


def compare(
    bundle: Path, torch_model: str, examples: Sequence[Example], *, threads: int, batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    """Answers every question on both sides.

    Args:
        bundle: Written by `export.to_onnx` from `torch_model`.
        torch_model: The model, as `--model` of the export names it.
        examples: The questions.
        threads: CPU threads of either side.
        batch_size: Maximum number of questions in a batch, on either side.
        max_new_tokens: Maximum number of tokens of an answer.

    Returns:
        Exact match, F1 and answers per second of both sides, and `differing`: each question whose texts differ.
    """
    torch.set_num_threads(threads)
    model, tokenizer = load_model(torch_model)
    model.eval()
    manifest = Bundle.open(bundle).manifest
    started = time.perf_counter()
    expected = generate_answers(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        windows=manifest.window_settings,
        no_answer_threshold=manifest.no_answer_threshold,
    )
    torch_seconds = time.perf_counter() - started

    got, seconds = _answer(bundle, examples, threads=threads, batch_size=batch_size, max_new_tokens=max_new_tokens)
    differing = [
        {
            "id": example.id,
            "torch": expected[example.id],
            "qa_onnx": got[example.id],
            "torch_smallest_margin": smallest_margin(model, tokenizer, example, max_new_tokens=max_new_tokens),
        }
        for example in examples
        if got[example.id] != expected[example.id]
    ]
    sides = {"torch": (expected, torch_seconds), "qa_onnx": (got, seconds)}
    return {
        "questions": len(examples),
        "texts_differing_from_torch": len(differing),
        "of_these_ties": sum(row["torch_smallest_margin"] <= TIE_MARGIN for row in differing),
        "precision": manifest.precision,
        **{
            name: {**evaluate(examples, texts).to_dict(), "answers_per_second": len(examples) / elapsed}
            for name, (texts, elapsed) in sides.items()
        },
        "differing": differing,
        "threads": threads,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        **describe_machine(),
    }


def _answer(
    bundle: Path, examples: Sequence[Example], *, threads: int, batch_size: int, max_new_tokens: int
) -> tuple[dict[str, str], float]:
    """The bundle's answers by id, and the seconds that they took."""
    config = EngineConfig(threads=threads, batch_size=batch_size)
    with Answerer.from_pretrained(bundle, provider="cpu", config=config) as answerer:
        started = time.perf_counter()
        answers = answerer.answer_batch(
            [example.question for example in examples],
            [example.context for example in examples],
            max_new_tokens=max_new_tokens,
            progress=True,
        )
        seconds = time.perf_counter() - started
    return {example.id: answer.text for example, answer in zip(examples, answers, strict=True)}, seconds


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, and the questions that differ."""
    lines = ["| | exact match | F1 | answers/s |", "| --- | --- | --- | --- |"]
    for name, label in (("torch", "PyTorch fp32"), ("qa_onnx", f"qa_onnx {result['precision']}")):
        side = result[name]
        lines.append(f"| {label} | {side['exact_match']:.2f} | {side['f1']:.2f} | {side['answers_per_second']:.1f} |")
    lines += ["", f"{result['texts_differing_from_torch']} of {result['questions']} answers differ"]
    for row in result["differing"]:
        tie = ", a tie" if row["torch_smallest_margin"] <= TIE_MARGIN else ""
        lines.append(
            f"  {row['id']}: torch {row['torch']!r}, qa_onnx {row['qa_onnx']!r} "
            f"(torch's smallest margin: {row['torch_smallest_margin']:.2g}{tie})"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description="Answer questions of files with PyTorch and with the bundle, and compare answer by answer.",
    )
    parser.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    parser.add_argument(
        "--torch",
        required=True,
        metavar="starter|DIR",
        help="the model that the bundle is of, as export.to_onnx --model",
    )
    add_data_options(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where answers differ by more than a tie, else as `run_command` does."""
    arguments = make_parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    return run_command(lambda: _compare_and_publish(arguments))


def _compare_and_publish(arguments: argparse.Namespace) -> int:
    check_outputs({"--output": arguments.output}, {"--data": arguments.data, "--model": arguments.model})
    examples = read_data(arguments)
    result = compare(
        arguments.model,
        arguments.torch,
        examples[: arguments.limit],
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    publish(result, table(result), arguments.output)
    return 0 if result["of_these_ties"] == result["texts_differing_from_torch"] else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
