"""Answers per second by batch size, passage length, questions per passage and threads: `python -m bench.scaling -h`.

One axis at a time is varied from one point, `BASE`. At each value every runner is a process of its own, and they take
turns. Passages are made of a file's text, cut to length, and no two are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from bench.harness import describe_run, publish, start_runners, take_turns
from bench.runner import RANDOM, Runner, add_model_options, prepare_models
from bench.settings import Settings
from bench.tables import render
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is asked, and how.

    Attributes:
        batch_size: Questions computed together.
        passage_words: Words of each passage.
        questions_per_passage: Questions on each.
        threads: CPU threads.
    """

    batch_size: int
    passage_words: int
    questions_per_passage: int
    threads: int


BASE = Point(batch_size=16, passage_words=120, questions_per_passage=4, threads=2)
AXES: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 4, 16, 32),
    "passage_words": (30, 120, 240, 480),
    "questions_per_passage": (1, 2, 4, 8),
    "threads": (1, 2, 4, 8, 16),
}


def make_questions(examples: Sequence[Example], point: Point, count: int) -> tuple[list[str], list[str]]:
    """`count` questions and their contexts: each passage begins at another word of all the file's passages."""
    words = " ".join(dict.fromkeys(example.context for example in examples)).split()
    passages = -(-count // point.questions_per_passage)
    contexts = []
    for index in range(passages):
        first = index * point.passage_words % max(len(words) - point.passage_words, 1)
        contexts.append(" ".join(words[first : first + point.passage_words]))
    questions = [examples[index % len(examples)].question for index in range(count)]
    return questions, [contexts[index // point.questions_per_passage] for index in range(count)]


def measure(arguments: argparse.Namespace, axis: str, value: int) -> list[dict[str, Any]]:
    """A row per runner at one value of one axis."""
    point = replace(BASE, threads=arguments.threads)
    point = replace(point, **{axis: value})
    questions, contexts = make_questions(read_examples(arguments.data), point, arguments.questions)
    settings = Settings(
        directory=str(arguments.work),
        questions=questions,
        contexts=contexts,
        max_new_tokens=arguments.max_new_tokens,
        stops=False,
        threads=point.threads,
        batch_size=point.batch_size,
    )
    with start_runners(arguments.only, settings) as (rows, runners):
        for runner in runners.values():
            runner.ask(question=0)  # warms up
        asks = {name: partial(_ask, runner, point.batch_size) for name, runner in runners.items()}
        replies = take_turns(asks, rounds=arguments.rounds)
    for row in rows:
        row |= {"axis": axis, "value": value, "point": asdict(point)}
        if row["name"] not in runners:
            continue
        found = replies[row["name"]]
        row["seconds"] = [reply["seconds"] for reply in found]
        row["peak_rss_mib"] = found[-1]["peak_rss_mib"]
        row["answers_per_second"] = len(questions) / statistics.median(row["seconds"])
        print(f"{axis} {value}, {row['name']}: {row['answers_per_second']:.2f} answers/s", flush=True)
    return rows


def _ask(runner: Runner, batch_size: int, _: int) -> dict[str, Any]:
    return runner.ask(batch_size=batch_size)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description="Answers per second, axis by axis.")
    add_model_options(parser)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help="default: all")
    parser.add_argument("--questions", type=int, default=32, help="at each point; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    prepare_models(arguments)
    values = AXES | {"threads": tuple(value for value in AXES["threads"] if value <= (os.cpu_count() or 1))}
    result = describe_run(
        "scaling",
        questions=arguments.questions,
        max_new_tokens=arguments.max_new_tokens,
        model=RANDOM if arguments.model is None else arguments.model.name,
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    result["rows"] = [
        row for axis in arguments.axes for value in values[axis] for row in measure(arguments, axis, value)
    ]
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
