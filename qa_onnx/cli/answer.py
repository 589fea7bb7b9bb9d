"""`answer`: questions about one context, from the command line, files or standard input."""

from __future__ import annotations

import argparse
import codecs
import io
import re
import sys
from pathlib import Path

from qa_onnx.answer import Answer
from qa_onnx.cli.options import (
    add_command,
    add_generation_options,
    add_max_new_tokens_option,
    add_model_options,
    generation_config,
    load_answerer,
)
from qa_onnx.cli.output import on_one_line, write_json, write_line
from qa_onnx.errors import InvalidInputError
from qa_onnx.files import read_text

_PATH = re.compile(r"[\w./\\~-]+\.(txt|text|md|rst|csv|tsv|json|jsonl|html?|pdf|docx?)", re.IGNORECASE)
"""One word that ends like the name of a file."""


def add_answer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    answer = add_command(commands, "answer", "answer questions about one context")
    asked = answer.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", action="append", metavar="TEXT", help="a question; may be given several times")
    asked.add_argument(
        "--questions", metavar="FILE|-", help="a text file, or - for standard input, with a question in each line"
    )
    answer.add_argument(
        "--context",
        required=True,
        metavar="TEXT|@FILE|-",
        help="the context itself; @ and a text file; or - for standard input. @@ is an @ that begins a context",
    )
    answer.add_argument("--json", action="store_true", help="print each whole answer as a JSON object on one line")
    add_model_options(answer)
    add_max_new_tokens_option(answer)
    add_generation_options(answer)
    answer.set_defaults(run=_answer)


def _answer(arguments: argparse.Namespace) -> None:
    if arguments.questions is not None and {arguments.questions, arguments.context.removeprefix("@")} == {"-"}:
        raise InvalidInputError("--questions - and --context - both read standard input; expected a file for one")
    questions = arguments.question if arguments.questions is None else _read_questions(arguments.questions)
    config, context = generation_config(arguments), _text_or_file(arguments.context)
    with load_answerer(arguments) as answerer:
        answers = answerer.answer_batch(questions, context, config=config)
    for question, answer in zip(questions, answers, strict=True):
        if arguments.json:
            write_json(answer.to_dict())
        elif len(questions) == 1:
            write_line("\n".join(_answer_lines(answer)))
        else:
            write_line("\n  ".join([on_one_line(question), *_answer_lines(answer)]))


def _answer_lines(answer: Answer) -> list[str]:
    """An answer and its alternatives for people, one a line, numbered where there are several."""
    lines = [
        f"{on_one_line(found.text) or '(no answer)'}  (score {found.score:.2f})"
        for found in (answer, *answer.alternatives)
    ]
    if not answer.text:
        lines[0] += ", the probability that there is none; --no-answer-threshold 1 gets one"
    return lines if len(lines) == 1 else [f"{number}. {line}" for number, line in enumerate(lines, 1)]


def _text_or_file(value: str) -> str:
    """`@FILE` is the content of a file, `-` and `@-` of standard input, and `@@TEXT` the text `@TEXT`.

    Raises:
        InvalidInputError: The file cannot be read, or the text is the name of a file.
    """
    if value in ("-", "@-"):
        return _read_standard_input("a text there, or --context TEXT or @FILE")
    if value.startswith("@@"):
        return value[1:]
    if not value.startswith("@"):
        if _PATH.fullmatch(value) and not _is_file_name(value):
            raise InvalidInputError(
                f"--context {value} looks like a file, and there is none of that name; expected a text. To ask about "
                f"what is in a file write --context @FILE, to ask about the name itself put a space before it"
            )
        if _is_file_name(value):
            raise InvalidInputError(
                f"--context {value} is the name of a file; expected a text. To ask about what is in the file write "
                f"--context @{value}, to ask about the name itself put a space before it"
            )
        return value
    try:
        return read_text(value[1:], expected="a text file")
    except InvalidInputError as error:
        raise InvalidInputError(f"--context @{error}. For a context that begins with @ write @@") from error


def _is_file_name(text: str) -> bool:
    try:
        return Path(text).exists() and not Path(text).is_dir()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def _read_questions(name: str) -> list[str]:
    """The lines of a file, or of standard input for `-`; blank ones are skipped.

    Raises:
        InvalidInputError: The file cannot be read or has no questions.
    """
    if name == "-":
        text = _read_standard_input("a question in each line there, or --questions FILE")
    else:
        try:
            text = read_text(name, expected="a text file with a question in each line")
        except InvalidInputError as error:
            raise InvalidInputError(f"--questions {error}") from error
    questions = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    if not questions:
        raise InvalidInputError(f"--questions {name}: has no questions; expected one in each line")
    return questions


def _read_standard_input(expected: str) -> str:
    if sys.stdin is None:
        raise InvalidInputError(f"standard input is closed; expected {expected}")
    try:
        return sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"standard input: byte {error.start} is not UTF-8; expected UTF-8") from error
