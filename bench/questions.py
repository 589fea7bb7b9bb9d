"""What the measurements of a bundle on questions of files share: their options and their questions."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from qa_onnx.cli import add_data_options, positive, read_data
from qa_onnx.data.example import Example
from qa_onnx.files import check_outputs


def add_question_options(parser: argparse.ArgumentParser, *, questions: int | None, seed: int) -> None:
    """Adds the options that `read_answerable` and the measurement read, `--threads` and `--extractive`.

    Args:
        parser: Of the measurement.
        questions: Default of `--questions`; None is all.
        seed: Default of `--seed`.
    """
    parser.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    add_data_options(parser)
    shown = "all" if questions is None else f"{questions}, drawn"
    parser.add_argument("--questions", type=positive, default=questions, metavar="N", help=f"default: {shown}")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per physical core")
    parser.add_argument("--extractive", action="store_true", help="answers are spans of the context")
    parser.add_argument("--seed", type=int, default=seed, metavar="N", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file, too")


def read_answerable(arguments: argparse.Namespace) -> list[Example]:
    """The questions that have an answer, as many as are wanted, once it is known that `--output` can be written.

    Raises:
        InvalidInputError: The data cannot be read, or the output cannot be written.
    """
    check_outputs({"--output": arguments.output}, {"--data": arguments.data, "--model": arguments.model})
    examples = [example for example in read_data(arguments) if example.answers]
    if arguments.questions is not None and len(examples) > arguments.questions:
        examples = random.Random(arguments.seed).sample(examples, arguments.questions)
    return examples
