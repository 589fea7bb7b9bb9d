"""`predict`: answers every question of data files, in the official prediction format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qa_onnx.answer import Answer
from qa_onnx.cli.options import (
    add_batch_size_option,
    add_command,
    add_data_options,
    add_generation_options,
    add_limit_option,
    add_max_new_tokens_option,
    add_model_options,
    generation_config,
    load_answerer,
    read_data,
)
from qa_onnx.cli.output import answer_to_json, write_line
from qa_onnx.files import check_outputs, keep_lines, partial_of, write_file


def add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    predict = add_command(commands, "predict", "answer every question of data files")
    predict.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write {id: answer}")
    predict.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="where to write whole answers, with scores and offsets, as JSON lines",
    )
    add_data_options(predict)
    add_limit_option(predict)
    add_batch_size_option(predict)
    add_model_options(predict)
    add_max_new_tokens_option(predict)
    add_generation_options(predict)
    predict.set_defaults(run=_predict)


def _predict(arguments: argparse.Namespace) -> None:
    config = generation_config(arguments)
    examples = read_data(arguments, needs_answers=False)[: arguments.limit]
    outputs = {"--output": arguments.output, "--answers": arguments.answers}
    written = outputs | {"the partial file of --output": partial_of(arguments.output)}
    check_outputs(written, {"--data": arguments.data, "--model": arguments.model})
    with keep_lines(arguments.output) as keep:

        def keep_answer(index: int, answer: Answer) -> None:
            keep(answer_to_json(examples[index], answer))

        with load_answerer(arguments) as answerer:
            answers = answerer.answer_batch(
                [example.question for example in examples],
                [example.context for example in examples],
                config=config,
                progress=True,
                on_answer=keep_answer,
            )
        predictions = {example.id: answer.text for example, answer in zip(examples, answers, strict=True)}
        write_file(arguments.output, json.dumps(predictions, ensure_ascii=False, indent=1) + "\n")
        if arguments.answers is not None:
            lines = [answer_to_json(example, answer) for example, answer in zip(examples, answers, strict=True)]
            write_file(arguments.answers, "".join(f"{line}\n" for line in lines))
    names = [str(path) for path in outputs.values() if path is not None]
    write_line(f"wrote {len(predictions)} answers to {' and '.join(names)}")
