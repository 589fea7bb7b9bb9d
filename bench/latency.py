"""How long one caller waits for one answer: `python -m bench.latency --help`.

Each runner is asked two questions on a passage that it has not seen, one after the other, then the next runner, then
the next passage. qa_onnx has the passage in its prefix cache for the second question, as it does by default.

With `--concurrency N`, N callers ask qa_onnx at once, each one question at a time, in turns with one call of
`answer_batch` with the same questions: tasks of asyncio that await `answer_async`, and threads that call `answer`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import describe_run, publish, start_runners
from bench.runner import RANDOM, add_model_options, prepare_models
from bench.settings import Settings
from bench.tables import OURS, render
from qa_onnx import Answer, Answerer, EngineConfig, GenerationConfig
from qa_onnx.bundle import Bundle
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples

PERCENTILES = (50, 95, 99)


def two_questions(examples: Sequence[Example], passages: int) -> list[Example]:
    """The first two questions on each of the first passages that have two."""
    by_passage = [list(group)[:2] for _, group in groupby(examples, key=lambda example: example.context)]
    return [example for pair in [pair for pair in by_passage if len(pair) == 2][:passages] for example in pair]


def measure(settings: Settings, names: Sequence[str]) -> list[dict[str, Any]]:
    """Asks every runner every question; returns a row per runner, `first` and `second` in seconds per passage.

    The first passage warms up and is not counted.
    """
    with start_runners(names, settings) as (rows, runners):
        for row in rows:
            row |= {"first": [], "second": []}
        measured = [row for row in rows if row["name"] in runners]
        for question in range(0, len(settings.questions), 2):
            for row in measured:
                replies = [runners[row["name"]].ask(question=question + place) for place in range(2)]
                if question:
                    row["first"].append(replies[0]["seconds"])
                    row["second"].append(replies[1]["seconds"])
                row["peak_rss_mib"] = replies[1]["peak_rss_mib"]
    for row in measured:
        for kind in ("first", "second"):
            row[f"{kind}_ms"] = _percentiles(row[kind], factor=1000)
    return rows


def _percentiles(values: Sequence[float], *, factor: float = 1) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES) * factor
    return dict(zip(map(str, PERCENTILES), found.tolist(), strict=True))


def measure_callers(arguments: argparse.Namespace, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Asks by one `answer_batch` and from many callers, in turns; a row per bundle and kind of caller."""
    questions, contexts = [example.question for example in examples], [example.context for example in examples]
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens)
    engine = EngineConfig(threads=arguments.threads, batch_size=arguments.batch_size, prefix_cache_bytes=0)
    found = []
    for name, directory in _bundles(arguments):
        with Answerer.from_pretrained(directory, config=engine) as answerer:
            rows: list[dict[str, Any]] = [
                {"name": name, "callers": callers, "batch_seconds": [], "seconds": [], "waits": [], "equal": 0}
                for callers in arguments.callers
            ]
            for index in range(arguments.rounds + 1):
                started = time.perf_counter()
                expected = answerer.answer_batch(questions, contexts, config=config)
                batch_seconds = time.perf_counter() - started
                for row in rows:
                    started = time.perf_counter()
                    pairs = CALLERS[row["callers"]](answerer, examples, arguments.concurrency, config)
                    seconds = time.perf_counter() - started
                    if index == 0:  # warms up
                        continue
                    row["batch_seconds"].append(batch_seconds)
                    row["seconds"].append(seconds)
                    row["waits"] += [wait for _, wait in pairs]
                    got = [answer for answer, _ in pairs]
                    row["equal"] += sum(one == other for one, other in zip(got, expected, strict=True))
        for row in rows:
            row["seconds_waited"] = _percentiles(row["waits"])
        found += rows
    return found


def _bundles(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """The bundles that callers ask, each with its name in the result."""
    if arguments.bundles is None:
        return [(name, arguments.work / name.split()[1]) for name in arguments.only if name in OURS]
    return [(f"qa_onnx {Bundle.open(path).manifest.precision}", path) for path in arguments.bundles]


def ask_from_tasks(
    answerer: Answerer, examples: Sequence[Example], concurrency: int, config: GenerationConfig
) -> list[tuple[Answer, float]]:
    """Asks by `answer_async`, so many at a time: the answers, in order, and how long each of them took in seconds."""

    async def ask_all() -> list[tuple[Answer, float]]:
        room = asyncio.Semaphore(concurrency)

        async def ask(example: Example) -> tuple[Answer, float]:
            async with room:
                started = time.perf_counter()
                answer = await answerer.answer_async(example.question, example.context, config=config)
                return answer, time.perf_counter() - started

        return await asyncio.gather(*map(ask, examples))

    return asyncio.run(ask_all())


def ask_from_threads(
    answerer: Answerer, examples: Sequence[Example], concurrency: int, config: GenerationConfig
) -> list[tuple[Answer, float]]:
    """The same by `answer` from so many threads, each of which asks its next question when it has its answer."""

    def ask(example: Example) -> tuple[Answer, float]:
        started = time.perf_counter()
        answer = answerer.answer(example.question, example.context, config=config)
        return answer, time.perf_counter() - started

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, examples))


CALLERS: dict[str, Callable[[Answerer, Sequence[Example], int, GenerationConfig], list[tuple[Answer, float]]]] = {
    "answer_async": ask_from_tasks,
    "answer": ask_from_threads,
}
"""The kinds of callers, by the method that they call."""


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description="Seconds until one answer is there.")
    add_model_options(parser, takes_bundles=True)
    parser.add_argument("--passages", type=int, default=25, help="the first warms up; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, metavar="N", help="callers that ask qa_onnx at once")
    parser.add_argument(
        "--callers", nargs="+", choices=CALLERS, default=list(CALLERS), help="how these ask; default: both"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="of qa_onnx with callers; default: %(default)s")
    parser.add_argument("--questions", type=int, default=240, help="of these callers; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of these callers; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.bundles is not None:
        if arguments.concurrency is None:
            parser.error("--bundles needs --concurrency: other runners are measured with a model")
        return _publish_callers(arguments)
    if arguments.work is None:
        parser.error("--work is required without --bundles")
    prepare_models(arguments)
    if arguments.concurrency is not None:
        return _publish_callers(arguments)
    examples = two_questions(read_examples(arguments.data), arguments.passages)
    settings = Settings(
        directory=str(arguments.work),
        questions=[example.question for example in examples],
        contexts=[example.context for example in examples],
        max_new_tokens=arguments.max_new_tokens,
        stops=False,
        threads=arguments.threads,
        prefix_cache=True,
    )
    result = describe_run(
        "latency",
        passages=len(examples) // 2 - 1,
        max_new_tokens=arguments.max_new_tokens,
        model=RANDOM if arguments.model is None else arguments.model.name,
        threads=arguments.threads,
    )
    result["rows"] = measure(settings, arguments.only)
    publish(result, render(result), arguments.output)
    return 0


def _publish_callers(arguments: argparse.Namespace) -> int:
    examples = read_examples(arguments.data)
    examples = random.Random(0).sample(examples, min(arguments.questions, len(examples)))
    if arguments.bundles is not None:
        models = {Path(Bundle.open(path).manifest.source_model).name for path in arguments.bundles}
        model = ", ".join(sorted(models))
    else:
        model = RANDOM if arguments.model is None else arguments.model.name
    result = describe_run(
        "callers",
        questions=len(examples),
        concurrency=arguments.concurrency,
        rounds=arguments.rounds,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        model=model,
        threads=arguments.threads,
    )
    result["rows"] = measure_callers(arguments, examples)
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
