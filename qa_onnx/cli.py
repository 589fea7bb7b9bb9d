"""The command line: `python -m qa_onnx answer | predict | evaluate | info`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qa_onnx.answerer import DEFAULT_BATCH_SIZE, Answerer
from qa_onnx.bundle import Bundle
from qa_onnx.errors import InvalidInputError, QAOnnxError, one_line
from qa_onnx.generation import DEFAULT_MAX_NEW_TOKENS
from qa_onnx.metrics import evaluate
from qa_onnx.session import PROVIDERS
from qa_onnx.squad import read_predictions, read_squad

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (see `run_command`)."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def run_command(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command of this project as a program does: with exit statuses, and one line instead of a traceback.

    SIGTERM ends it as Ctrl-C does, by `KeyboardInterrupt`, so that whatever was begun is tidied up.

    Args:
        command: Returns its exit status; None is 0.
        interrupted: What to say after Ctrl-C or SIGTERM.

    Returns:
        The command's status, 2 with one line on standard error for bad input, or 130 after Ctrl-C or SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command() or 0
    except QAOnnxError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader went away, as in `| head`: nothing is left to say, and no one to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _answer(arguments: argparse.Namespace) -> None:
    context = _text_or_file(arguments.context)
    with Answerer.from_pretrained(arguments.model, provider=arguments.provider, threads=arguments.threads) as answerer:
        answer = answerer.answer(arguments.question, context, max_new_tokens=arguments.max_new_tokens)
    if arguments.json:
        _write(json.dumps(vars(answer), ensure_ascii=False))
    else:
        _write(answer.text)


def _predict(arguments: argparse.Namespace) -> None:
    examples = read_squad(arguments.data)[: arguments.limit]
    if arguments.output.is_dir() or not arguments.output.parent.is_dir():
        raise InvalidInputError(f"{arguments.output}: cannot be written; expected a file in a directory that exists")
    with Answerer.from_pretrained(arguments.model, provider=arguments.provider, threads=arguments.threads) as answerer:
        answers = answerer.answer_batch(
            [example.question for example in examples],
            [example.context for example in examples],
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            progress=True,
        )
    predictions = {example.id: answer.text for example, answer in zip(examples, answers, strict=True)}
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    try:
        partial.write_text(json.dumps(predictions, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        partial.replace(arguments.output)
    except OSError as error:
        raise InvalidInputError(
            f"{arguments.output}: cannot be written ({error.strerror}); expected a place with room and write permission"
        ) from error
    _write(f"wrote {len(predictions)} answers to {arguments.output}")


def _evaluate(arguments: argparse.Namespace) -> None:
    examples = read_squad(arguments.data)
    predictions = read_predictions(arguments.predictions)
    missing = sum(example.id not in predictions for example in examples)
    if missing:
        sys.stderr.write(f"{missing} of {len(examples)} questions have no prediction and score 0\n")
    unknown = len(predictions.keys() - {example.id for example in examples})
    if unknown:
        sys.stderr.write(f"{unknown} predictions are of questions that are not in {arguments.data}\n")
    _write(json.dumps(evaluate(examples, predictions).to_dict()))


def _info(arguments: argparse.Namespace) -> None:
    manifest = Bundle.open(arguments.model).manifest.to_dict()
    _write(json.dumps(manifest, ensure_ascii=False, indent=2))


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _text_or_file(value: str) -> str:
    """`@FILE` stands for what is in the file."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"--context {value}: cannot be read ({error}); expected a text file in UTF-8"
        ) from error


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qa_onnx", description="Answer questions about passages with a GPT-2 exported to ONNX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    answer = commands.add_parser("answer", help="answer one question")
    answer.add_argument("--question", required=True, metavar="TEXT")
    answer.add_argument("--context", required=True, metavar="TEXT|@FILE", help="the passage, or @ and a text file")
    answer.add_argument("--json", action="store_true", help="print the whole answer as a JSON object")
    answer.set_defaults(run=_answer)

    predict = commands.add_parser("predict", help="answer every question of a SQuAD file")
    predict.add_argument("--data", required=True, type=Path, metavar="FILE", help="SQuAD v1.1 or v2.0 JSON")
    predict.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write {id: answer}")
    predict.add_argument("--limit", type=positive, metavar="N", help="answer only the first N questions")
    predict.add_argument(
        "--batch-size", type=positive, default=DEFAULT_BATCH_SIZE, metavar="N", help="default: %(default)s questions"
    )
    predict.set_defaults(run=_predict)

    for command in (answer, predict):
        command.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
        command.add_argument("--provider", choices=PROVIDERS, default="auto", help="default: %(default)s")
        command.add_argument("--threads", type=positive, metavar="N", help="default: one a physical core")
        command.add_argument(
            "--max-new-tokens", type=positive, default=DEFAULT_MAX_NEW_TOKENS, metavar="N", help="default: %(default)s"
        )

    scores = commands.add_parser("evaluate", help="score predictions with the official exact match and F1")
    scores.add_argument("--data", required=True, type=Path, metavar="FILE", help="SQuAD v1.1 or v2.0 JSON")
    scores.add_argument("--predictions", required=True, type=Path, metavar="FILE", help="JSON object {id: answer}")
    scores.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="check a bundle and print its manifest")
    info.add_argument("--model", required=True, type=Path, metavar="BUNDLE")
    info.set_defaults(run=_info)
    return parser
