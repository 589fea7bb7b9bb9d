"""`evaluate`: scores predictions with the official exact match and F1."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qa_onnx.cli.options import add_command, add_data_options, positive, read_data, source_names
from qa_onnx.cli.output import to_json_lines, write_line
from qa_onnx.data.example import Example
from qa_onnx.data.json_text import shown
from qa_onnx.errors import InvalidInputError
from qa_onnx.evaluation import error_analysis
from qa_onnx.evaluation.metrics import best_thresholds, evaluate
from qa_onnx.evaluation.predictions import read_answers, read_predictions
from qa_onnx.files import check_outputs, write_file


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    scores = add_command(commands, "evaluate", "score predictions with the official exact match and F1")
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


def _evaluate(arguments: argparse.Namespace) -> None:
    check_outputs(
        {"--worst": arguments.worst, "--plot": arguments.plot},
        {"--data": arguments.data, "--predictions": arguments.predictions, "--answers": arguments.answers},
    )
    given = read_data(arguments)
    if arguments.answers is not None:
        answers = read_answers(arguments.answers)
    else:
        answers = {name: {"text": text} for name, text in read_predictions(arguments.predictions).items()}
    predictions = {name: answer["text"] for name, answer in answers.items()}
    examples = _select_scored(arguments, given, predictions)
    windows = {name: answer["windows"] for name, answer in answers.items() if "windows" in answer}
    if arguments.plot is not None:
        error_analysis.plot(examples, answers, arguments.plot)
    if arguments.worst is not None:
        worst = error_analysis.worst_cases(examples, answers, limit=arguments.worst_limit)
        write_file(arguments.worst, to_json_lines(worst))
    write_line(error_analysis.table(examples, predictions, windows))
    figures = evaluate(examples, predictions).to_dict()
    if any(example.id not in predictions for example in given):
        figures["questions_in_data"] = len(given)
    probabilities = {name: answer["no_answer_probability"] for name, answer in answers.items() if "score" in answer}
    if probabilities and any(not example.answers for example in examples):
        figures |= best_thresholds(examples, predictions, probabilities)
    write_line(json.dumps(figures))


def _select_scored(
    arguments: argparse.Namespace, examples: list[Example], predictions: dict[str, str]
) -> list[Example]:
    """The questions that count: those with a prediction, or with `--all` every one. Reports the others.

    Raises:
        InvalidInputError: None of the questions has a prediction.
    """
    unknown = len(predictions.keys() - {example.id for example in examples})
    predicted = [example for example in examples if example.id in predictions]
    missing = len(examples) - len(predicted)
    if missing and arguments.all:
        sys.stderr.write(f"{missing:,} of {len(examples):,} questions have no prediction and score 0\n")
    elif missing:
        if not predicted:
            raise InvalidInputError(
                f"{arguments.predictions or arguments.answers}: has no prediction of the {len(examples):,} questions "
                f"in {source_names(arguments.data)}; expected their ids, such as {shown(examples[0].id)}. --all counts "
                "questions without a prediction as wrong"
            )
        sys.stderr.write(
            f"scored {len(predicted):,} of {len(examples):,} questions: the others have no prediction; --all counts "
            "them as wrong\n"
        )
    if unknown:
        sys.stderr.write(f"{unknown:,} predictions are of questions that are not in {source_names(arguments.data)}\n")
    return examples if arguments.all else predicted
