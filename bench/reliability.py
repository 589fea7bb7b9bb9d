"""Can a bundle's threshold and scores be relied on? `python -m bench.reliability --help`.

Every question is asked about its own passage and about another one of the same article, which does not answer it. Give
questions that neither the training nor the calibration has seen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import publish
from bench.machine import describe_machine
from bench.questions import add_question_options, read_answerable
from qa_onnx import Answer, Answerer, EngineConfig, GenerationConfig, InvalidInputError
from qa_onnx.cli import run_command
from qa_onnx.data.example import Example
from qa_onnx.data.pairs import unanswerable_pairs
from qa_onnx.evaluation.metrics import evaluate, score_example
from qa_onnx.scores import expected_calibration_error


def measure(
    bundle: Path, examples: Sequence[Example], *, threads: int | None, extractive: bool, seed: int
) -> dict[str, Any]:
    """Answers questions with and without an answer, with the bundle's threshold and without.

    Args:
        bundle: With a threshold.
        examples: All questions have an answer.
        threads: As of `EngineConfig`.
        extractive: As of `GenerationConfig`.
        seed: Of the pairs.

    Returns:
        F1 of the answerable questions with and without the threshold, the share of the others that get no answer, and
        the expected calibration error of `score` and of the model's own probability.

    Raises:
        InvalidInputError: The bundle has no threshold.
    """
    pairs = unanswerable_pairs(examples, len(examples), seed=seed)
    with Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(threads=threads)) as answerer:
        threshold = answerer.manifest.no_answer_threshold
        if threshold is None:
            raise InvalidInputError(f"{bundle} has no threshold; export it with --verify, or run qa_onnx calibrate")

        def ask(asked: Sequence[Example], limit: float | None) -> list[Answer]:
            return answerer.answer_batch(
                [example.question for example in asked],
                [example.context for example in asked],
                config=GenerationConfig(extractive=extractive, no_answer_threshold=limit),
                progress=True,
            )

        forced, decided, other = ask(examples, 1.0), ask(examples, None), ask(pairs, None)
        calibration = answerer.manifest.scores
    scored = [
        (answer, score_example(example, answer.text)[0] == 1) for example, answer in zip(examples, forced, strict=True)
    ]
    right = [is_right for _, is_right in scored]
    return {
        "questions": len(examples),
        "without_answer": len(pairs),
        "threshold": threshold,
        "f1_answerable_forced": _f1(examples, forced),
        "f1_answerable": _f1(examples, decided),
        "answerable_without_answer_percent": _empty(decided),
        "no_answer_percent": _empty(other),
        "ece_of_score": expected_calibration_error([answer.score for answer in forced], right),
        "ece_of_model": expected_calibration_error([math.exp(answer.logprob) for answer in forced], right),
        "calibrated_on": calibration.get("source"),
        **describe_machine(),
    }


def _f1(examples: Sequence[Example], answers: Sequence[Answer]) -> float:
    return evaluate(examples, {e.id: answer.text for e, answer in zip(examples, answers, strict=True)}).f1


def _empty(answers: Sequence[Answer]) -> float:
    return 100.0 * sum(answer.finish_reason == "no_answer" for answer in answers) / len(answers)


def table(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    return "\n".join(
        [
            f"threshold {result['threshold']:.3f}",
            f"{result['questions']} questions with an answer: F1 {result['f1_answerable_forced']:.2f} if each is "
            f"answered, {result['f1_answerable']:.2f} with the threshold "
            f"({result['answerable_without_answer_percent']:.1f} % get no answer)",
            f"{result['without_answer']} questions without one: {result['no_answer_percent']:.1f} % get no answer",
            f"expected calibration error: score {result['ece_of_score']:.3f}, the model's own probability "
            f"{result['ece_of_model']:.3f}",
        ]
    )


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.reliability",
        description="Measure a bundle's no-answer threshold and its scores on questions that it was not calibrated on.",
    )
    add_question_options(parser, questions=None, seed=1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: _measure_and_publish(arguments))


def _measure_and_publish(arguments: argparse.Namespace) -> None:
    result = measure(
        arguments.model,
        read_answerable(arguments),
        threads=arguments.threads,
        extractive=arguments.extractive,
        seed=arguments.seed,
    )
    publish(result, table(result), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
