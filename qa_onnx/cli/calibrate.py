"""`calibrate`: finds the no-answer threshold and calibrates scores on data files."""

from __future__ import annotations

import argparse

from qa_onnx.bundle import Bundle
from qa_onnx.calibration import calibrate
from qa_onnx.cli.options import (
    add_batch_size_option,
    add_command,
    add_data_options,
    add_limit_option,
    add_max_new_tokens_option,
    add_model_options,
    load_answerer,
    read_data,
    source_names,
)
from qa_onnx.cli.output import write_json
from qa_onnx.errors import InvalidInputError


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "calibrate",
        "find the no-answer threshold and calibrate scores on data files, and keep both in the bundle",
    )
    command.add_argument("--extractive", action="store_true", help="with answers that are spans of the context")
    add_data_options(command)
    add_limit_option(command)
    add_batch_size_option(command)
    add_model_options(command)
    add_max_new_tokens_option(command)
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    examples = read_data(arguments)[: arguments.limit]
    if not any(example.answers for example in examples):
        raise InvalidInputError(
            f"{source_names(arguments.data)}: none of {len(examples)} questions has an answer; "
            "expected some that have one"
        )
    with load_answerer(arguments) as answerer:
        found = calibrate(
            answerer,
            examples,
            source=", ".join(path.name for path in arguments.data),
            extractive=arguments.extractive,
            max_new_tokens=arguments.max_new_tokens,
        )
    if "threshold" not in found["no_answer"]:
        raise InvalidInputError(
            f"{source_names(arguments.data)}: no threshold can be found. {found['no_answer']['reason']}"
        )
    Bundle.open(arguments.model).keep(found)
    write_json(found)
