"""The command line: `python -m qa_onnx answer | serve | predict | evaluate | calibrate | info | answer-file`.

One module for each command, and what they share: `options`, `output` and `program`, of which other commands of this
project take theirs from here, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qa_onnx.bulk.command import add_bulk_options, answer_file
from qa_onnx.bundle import Bundle
from qa_onnx.cli.answer import add_answer
from qa_onnx.cli.calibrate import add_calibrate
from qa_onnx.cli.evaluate import add_evaluate
from qa_onnx.cli.options import (
    add_batch_size_option,
    add_bundle_option,
    add_columns_option,
    add_command,
    add_data_options,
    add_generation_options,
    add_max_new_tokens_option,
    add_model_options,
    engine_config,
    generation_config,
    positive,
    read_data,
)
from qa_onnx.cli.output import on_one_line, write_json, write_line
from qa_onnx.cli.predict import add_predict
from qa_onnx.cli.program import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_command
from qa_onnx.description import describe
from qa_onnx.kernels import find_kernels
from qa_onnx.serve import command as serve_command

__all__ = [
    "EXIT_BAD_INPUT",
    "EXIT_INTERRUPTED",
    "add_columns_option",
    "add_data_options",
    "main",
    "make_parser",
    "positive",
    "read_data",
    "run_command",
]

EXAMPLE = """\
example:
  python -m qa_onnx answer --model runs/demo/bundle --context @passage.txt --question "Who made the first sketch?"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status (see `run_command`)."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qa_onnx",
        description="Answer questions about contexts with a GPT-2 exported to ONNX.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_answer(commands)
    _add_serve(commands)
    add_predict(commands)
    add_evaluate(commands)
    add_calibrate(commands)
    _add_info(commands)
    _add_answer_file(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = add_command(
        commands, "serve", "run an HTTP service with a page for the browser, until Ctrl-C; needs the extra serve"
    )
    serve_command.add_options(serve)
    add_batch_size_option(serve)
    add_model_options(serve)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    serve_command.run(arguments, engine=engine_config(arguments))


def _add_answer_file(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bulk = add_command(commands, "answer-file", "answer files of any size, row by row, into a folder of files")
    add_bulk_options(bulk)
    add_columns_option(bulk)
    add_batch_size_option(bulk)
    add_model_options(bulk)
    add_max_new_tokens_option(bulk)
    add_generation_options(bulk)
    bulk.set_defaults(run=_answer_file)


def _answer_file(arguments: argparse.Namespace) -> None:
    write_line(answer_file(arguments, generation=generation_config(arguments), engine=engine_config(arguments)))


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = add_command(commands, "info", "check a bundle and describe it")
    add_bundle_option(info)
    info.add_argument("--json", action="store_true", help="print the whole manifest as a JSON object")
    info.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.model)
    if arguments.json:
        write_json(bundle.manifest.to_dict(), indent=2)
        return
    write_line(str(arguments.model))
    found = find_kernels(bundle.manifest.precision)
    here = f"{found.library.instruction_set}, on this machine" if found.library else f"none: {found.reason}"
    for label, value in [*describe(bundle.manifest), ("kernels", here)]:
        write_line(f"  {label:<18}{on_one_line(value)}")
