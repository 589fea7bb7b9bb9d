"""The command line: `python -m qa_onnx answer | answer-file | predict | evaluate | calibrate | info | serve`."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qa_onnx.answer import Answer
from qa_onnx.answerer import Answerer
from qa_onnx.bulk.command import add_bulk_options, answer_file
from qa_onnx.bundle import Bundle
from qa_onnx.calibration import calibrate
from qa_onnx.config import DEFAULT_BATCH_SIZE, DEFAULT_MAX_NEW_TOKENS, KERNELS, EngineConfig, GenerationConfig
from qa_onnx.data.columns import FIELDS, parse_columns
from qa_onnx.data.example import Example
from qa_onnx.data.json_text import shown
from qa_onnx.data.reader import read_sources
from qa_onnx.data.rows import check_skipped, skipped_lines
from qa_onnx.description import describe
from qa_onnx.engine.session import PROVIDERS
from qa_onnx.errors import InvalidInputError, QAOnnxError, one_line
from qa_onnx.evaluation import error_analysis
from qa_onnx.evaluation.metrics import best_thresholds, evaluate
from qa_onnx.evaluation.predictions import read_answers, read_predictions
from qa_onnx.files import check_outputs, keep_lines, partial_of, read_text, write_file
from qa_onnx.kernels import find_kernels
from qa_onnx.serve import command as serve_command

DATA_HELP = (
    "questions: SQuAD JSON, JSON lines, CSV, TSV, Parquet, a folder of `save_to_disk` or a hub id; one or several"
)
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
_PATH = re.compile(r"[\w./\\~-]+\.(txt|text|md|rst|csv|tsv|json|jsonl|html?|pdf|docx?)", re.IGNORECASE)
"""One word that ends as the names of files do."""


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
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    if sys.stdout is None:
        sys.stderr.write("error: standard output is closed; expected a file or a terminal. To drop it: > /dev/null\n")
        return EXIT_BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except QAOnnxError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{'. '.join([interrupted, *getattr(error, '__notes__', [])])}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader went away, as in `| head`: nothing is left to say, and no one to say it to
        _flush_or_drop_output()
        return 0
    except OSError as error:  # such as a full disk, under standard output or elsewhere
        sys.stderr.write(f"error: {one_line(error)}; expected a place that can be read and written, with room\n")
        _flush_or_drop_output()
        return EXIT_BAD_INPUT
    finally:
        signal.signal(signal.SIGTERM, before)


def _flush_or_drop_output() -> None:
    """Writes what is left of standard output; where that fails, the interpreter will not try it again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:  # said already, or the reader went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(arguments: argparse.Namespace) -> None:
    if arguments.questions is not None and {arguments.questions, arguments.context.removeprefix("@")} == {"-"}:
        raise InvalidInputError("--questions - and --context - both read standard input; expected a file for one")
    questions = arguments.question if arguments.questions is None else _read_questions(arguments.questions)
    config, context = _config(arguments), _text_or_file(arguments.context)
    with _load(arguments) as answerer:
        answers = answerer.answer_batch(questions, context, config=config)
    for question, answer in zip(questions, answers, strict=True):
        if arguments.json:
            _write_json(answer.to_dict())
        elif len(questions) == 1:
            _write("\n".join(_answer_lines(answer)))
        else:
            _write("\n  ".join([_on_one_line(question), *_answer_lines(answer)]))


def _answer_lines(answer: Answer) -> list[str]:
    """An answer and its alternatives for people, one a line, numbered where there are several."""
    lines = [
        f"{_on_one_line(found.text) or '(no answer)'}  (score {found.score:.2f})"
        for found in (answer, *answer.alternatives)
    ]
    return lines if len(lines) == 1 else [f"{number}. {line}" for number, line in enumerate(lines, 1)]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _answer_file(arguments: argparse.Namespace) -> None:
    _write(answer_file(arguments, generation=_config(arguments), engine=_engine_config(arguments)))


def _predict(arguments: argparse.Namespace) -> None:
    outputs = {"--output": arguments.output, "--answers": arguments.answers}
    written = outputs | {"the partial file of --output": partial_of(arguments.output)}
    check_outputs(written, {"--data": arguments.data, "--model": arguments.model})
    config = _config(arguments)
    examples = read_data(arguments, needs_answers=False)[: arguments.limit]
    with keep_lines(arguments.output) as keep:

        def keep_answer(index: int, answer: Answer) -> None:
            keep(_json_line(examples[index], answer))

        answers = _answer_all(arguments, examples, config, on_answer=keep_answer)
        predictions = {example.id: answer.text for example, answer in zip(examples, answers, strict=True)}
        write_file(arguments.output, json.dumps(predictions, ensure_ascii=False, indent=1) + "\n")
        if arguments.answers is not None:
            lines = [_json_line(example, answer) for example, answer in zip(examples, answers, strict=True)]
            write_file(arguments.answers, "".join(f"{line}\n" for line in lines))
    names = [str(path) for path in outputs.values() if path is not None]
    _write(f"wrote {len(predictions)} answers to {' and '.join(names)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    check_outputs(
        {"--worst": arguments.worst, "--plot": arguments.plot},
        {"--data": arguments.data, "--predictions": arguments.predictions, "--answers": arguments.answers},
    )
    examples = read_data(arguments)
    if arguments.answers is not None:
        answers = read_answers(arguments.answers)
    else:
        answers = {name: {"text": text} for name, text in read_predictions(arguments.predictions).items()}
    predictions = {name: answer["text"] for name, answer in answers.items()}
    in_data = len(examples)
    unknown = len(predictions.keys() - {example.id for example in examples})
    asked = [example for example in examples if example.id in predictions]
    missing = in_data - len(asked)
    if missing and arguments.all:
        sys.stderr.write(f"{missing:,} of {in_data:,} questions have no prediction and score 0\n")
    elif missing:
        if not asked:
            given = arguments.predictions or arguments.answers
            raise InvalidInputError(
                f"{given}: has no prediction of the {in_data:,} questions in {_names(arguments.data)}; expected their "
                f"ids, such as {shown(examples[0].id)}. --all counts questions without a prediction as wrong"
            )
        sys.stderr.write(
            f"scored {len(asked):,} of {in_data:,} questions: the others have no prediction; --all counts them as "
            "wrong\n"
        )
        examples = asked
    if unknown:
        sys.stderr.write(f"{unknown:,} predictions are of questions that are not in {_names(arguments.data)}\n")
    windows = {name: answer["windows"] for name, answer in answers.items() if "windows" in answer}
    if arguments.plot is not None:
        error_analysis.plot(examples, answers, arguments.plot)
    if arguments.worst is not None:
        worst = error_analysis.worst_cases(examples, answers, limit=arguments.worst_limit)
        write_file(arguments.worst, _json_lines(worst))
    _write(error_analysis.table(examples, predictions, windows))
    figures = evaluate(examples, predictions).to_dict()
    if missing:
        figures["questions_in_data"] = in_data
    probabilities = {name: answer["no_answer_probability"] for name, answer in answers.items() if "score" in answer}
    if probabilities and any(not example.answers for example in examples):
        figures |= best_thresholds(examples, predictions, probabilities)
    _write(json.dumps(figures))


def _calibrate(arguments: argparse.Namespace) -> None:
    examples = read_data(arguments)[: arguments.limit]
    if not any(example.answers for example in examples):
        raise InvalidInputError(
            f"{_names(arguments.data)}: none of {len(examples)} questions has an answer; expected some with one, or "
            "there is nothing to tell apart"
        )
    with _load(arguments) as answerer:
        found = calibrate(
            answerer,
            examples,
            source=", ".join(path.name for path in arguments.data),
            extractive=arguments.extractive,
            max_new_tokens=arguments.max_new_tokens,
        )
    if "threshold" not in found["no_answer"]:
        raise InvalidInputError(f"{_names(arguments.data)}: no threshold can be found. {found['no_answer']['reason']}")
    Bundle.open(arguments.model).keep(found)
    _write_json(found)


def read_data(arguments: argparse.Namespace, *, needs_answers: bool = True) -> list[Example]:
    """Reads the questions of a command, and tells on standard error of bad rows that are skipped.

    Args:
        arguments: With the options of `add_data_options`.
        needs_answers: False leaves gold answers aside.

    Raises:
        InvalidInputError: A bad row that is not to be skipped, or as of `qa_onnx.data.reader.read_sources`.
    """
    skipped: list[str] = []
    columns = parse_columns(arguments.columns)
    examples = read_sources(arguments.data, columns=columns, skipped=skipped, needs_answers=needs_answers)
    if not arguments.skip_bad_rows:
        check_skipped(skipped, len(examples))
    for line in skipped_lines(skipped):
        sys.stderr.write(f"{_on_one_line(line)}\n")
    return examples


def _names(sources: Sequence[Path]) -> str:
    return " and ".join(map(str, sources))


def _load(arguments: argparse.Namespace) -> Answerer:
    return Answerer.from_pretrained(arguments.model, provider=arguments.provider, config=_engine_config(arguments))


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        threads=arguments.threads,
        kernels=arguments.kernels,
        device_id=arguments.device_id,
        batch_size=getattr(arguments, "batch_size", DEFAULT_BATCH_SIZE),
    )


def _serve(arguments: argparse.Namespace) -> None:
    serve_command.run(arguments, engine=_engine_config(arguments))


def _json_line(example: Example, answer: Answer) -> str:
    return json.dumps({"id": example.id} | answer.to_dict(), ensure_ascii=False)


def _answer_all(
    arguments: argparse.Namespace,
    examples: Sequence[Example],
    config: GenerationConfig,
    on_answer: Callable[[int, Answer], object] | None = None,
) -> list[Answer]:
    with _load(arguments) as answerer:
        return answerer.answer_batch(
            [example.question for example in examples],
            [example.context for example in examples],
            config=config,
            progress=True,
            on_answer=on_answer,
        )


def _config(arguments: argparse.Namespace) -> GenerationConfig:
    names = {field.name for field in fields(GenerationConfig)} - {"ignore_eos"}
    return GenerationConfig(**{name: getattr(arguments, name) for name in names})


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _info(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.model)
    if arguments.json:
        _write_json(bundle.manifest.to_dict(), indent=2)
        return
    _write(str(arguments.model))
    found = find_kernels(bundle.manifest.precision)
    here = f"{found.library.instruction_set}, on this machine" if found.library else f"none: {found.reason}"
    for label, value in [*describe(bundle.manifest), ("kernels", here)]:
        _write(f"  {label:<18}{_on_one_line(value)}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


def _write_json(value: dict[str, Any], *, indent: int | None = None) -> None:
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    _write(json.dumps(value, ensure_ascii=not is_utf8, indent=indent))


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


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return value


def add_columns_option(parser: argparse._ActionsContainer) -> None:
    """Adds `--columns`, which `qa_onnx.data.columns.parse_columns` reads."""
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=NAME",
        help=f"names of columns, where rows are flat, such as question=ask; fields: {', '.join(FIELDS)}",
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--data`, `--columns` and `--skip-bad-rows`, which `read_data` reads."""
    parser.add_argument("--data", required=True, nargs="+", type=Path, metavar="FILE", help=DATA_HELP)
    add_columns_option(parser)
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave bad rows out and name them; default: the first is an error"
    )


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `GenerationConfig` but `max_new_tokens` and `ignore_eos`; it checks them."""
    group = parser.add_argument_group("how to answer")
    group.add_argument("--extractive", action="store_true", help="only answers that are spans of the context")
    for name, kind, text in (
        ("num_answers", int, "different answers per question, the most probable first; default: 1"),
        ("no_repeat_ngram_size", int, "no n-gram of N tokens twice in prompt and answer; default: 0, no limit"),
        ("temperature", float, "draw tokens; default: 0, take the most probable"),
        ("top_k", int, "draw from the N most probable tokens; default: 0, all"),
        ("top_p", float, "draw from the most probable tokens that add up to X; default: 1, all"),
        ("seed", int, "of the draws; default: another each time"),
        ("no_answer_threshold", float, "no answer above this probability of none; default: the bundle's"),
        ("window", int, "tokens of a context read at once; default: the bundle's"),
        ("stride", int, "tokens that windows of a long context share; default: the bundle's"),
    ):
        default = next(field.default for field in fields(GenerationConfig) if field.name == name)
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, default=default, metavar="X" if kind is float else "N", help=text)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qa_onnx", description="Answer questions about contexts with a GPT-2 exported to ONNX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    answer = commands.add_parser("answer", help="answer questions about one context")
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
    answer.set_defaults(run=_answer)

    predict = commands.add_parser("predict", help="answer every question of data files")
    predict.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write {id: answer}")
    predict.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="where to write whole answers, with scores and offsets, as JSON lines",
    )
    predict.set_defaults(run=_predict)

    calibrate = commands.add_parser(
        "calibrate", help="find the no-answer threshold and calibrate scores on data files, and keep both in the bundle"
    )
    calibrate.add_argument("--extractive", action="store_true", help="with answers that are spans of the context")
    calibrate.set_defaults(run=_calibrate)

    serve = commands.add_parser("serve", help="answer over HTTP, until Ctrl-C or SIGTERM; needs the extra serve")
    serve_command.add_options(serve)
    serve.set_defaults(run=_serve)
    bulk = commands.add_parser("answer-file", help="answer files of any size, row by row, into a folder of files")
    add_bulk_options(bulk)
    add_columns_option(bulk)
    bulk.set_defaults(run=_answer_file)

    for command in (predict, calibrate):
        add_data_options(command)
        command.add_argument("--limit", type=positive, metavar="N", help="answer only the first N questions")
    for command in (predict, calibrate, bulk, serve):
        command.add_argument(
            "--batch-size",
            type=positive,
            default=DEFAULT_BATCH_SIZE,
            metavar="N",
            help="default: %(default)s questions",
        )
    for command in (answer, predict, calibrate, bulk, serve):
        command.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
        command.add_argument("--provider", choices=PROVIDERS, default="auto", help="default: %(default)s")
        command.add_argument("--threads", type=positive, metavar="N", help="default: one per physical core")
        command.add_argument(
            "--kernels",
            choices=KERNELS,
            default="auto",
            help="our own operators, on the CPU; default: %(default)s",
        )
        command.add_argument("--device-id", type=int, default=0, metavar="N", help="GPU; default: %(default)s")
    for command in (answer, predict, calibrate, bulk):
        command.add_argument(
            "--max-new-tokens", type=positive, default=DEFAULT_MAX_NEW_TOKENS, metavar="N", help="default: %(default)s"
        )
    for command in (answer, predict, bulk):
        _add_generation_options(command)

    scores = commands.add_parser("evaluate", help="score predictions with the official exact match and F1")
    add_data_options(scores)
    given = scores.add_mutually_exclusive_group(required=True)
    given.add_argument("--predictions", type=Path, metavar="FILE", help="JSON object {id: answer}")
    given.add_argument("--answers", type=Path, metavar="FILE", help="whole answers, from `predict --answers`")
    scores.add_argument(
        "--all",
        action="store_true",
        help="count questions without a prediction as wrong, as the official script does; default: leave them out",
    )
    scores.add_argument("--worst", type=Path, metavar="FILE", help="where to write the worst cases as JSON lines")
    scores.add_argument("--worst-limit", type=positive, default=50, metavar="N", help="default: %(default)s cases")
    scores.add_argument(
        "--plot", type=Path, metavar="PNG", help="how far scores can be trusted, drawn; needs --answers and matplotlib"
    )
    scores.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="check a bundle and describe it")
    info.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    info.add_argument("--json", action="store_true", help="print the whole manifest as a JSON object")
    info.set_defaults(run=_info)
    return parser
