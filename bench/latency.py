"""How long one caller waits for one answer: `python -m bench.latency --help`.

Each runner is asked two questions on a passage that it has not seen, one after the other, then the next runner, then
the next passage. qa_onnx remembers the passage for the second question, as it does by default.

With `--concurrency N`, N callers ask qa_onnx at once, each one question at a time, beside one call of `answer_batch`
with the same questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from bench.peers import Settings
from bench.report import OURS, render
from bench.runner import RANDOM, Runner, add_model_options, prepare_models
from qa_onnx import Answer, Answerer, GenerationConfig
from qa_onnx.squad import Example, read_squad

PERCENTILES = (50, 95, 99)


def two_questions(examples: Sequence[Example], passages: int) -> list[Example]:
    """The first two questions on each of the first passages that have two."""
    by_passage = [list(group)[:2] for _, group in groupby(examples, key=lambda example: example.context)]
    return [example for pair in [pair for pair in by_passage if len(pair) == 2][:passages] for example in pair]


def measure(settings: Settings, names: Sequence[str]) -> list[dict[str, Any]]:
    """Asks every runner every question; returns a row for each, `first` and `second` in seconds a passage.

    The first passage warms up and is not counted.
    """
    rows: list[dict[str, Any]] = []
    runners: list[tuple[Runner, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        try:
            for name in names:
                runner = Runner(name, settings, Path(temporary))
                row: dict[str, Any] = {"name": name, "status": "measured", "first": [], "second": []}
                rows.append(row)
                if runner.missing is None:
                    runners.append((runner, row))
                else:
                    row["status"] = f"not installed ({runner.missing})"
            for question in range(0, len(settings.questions), 2):
                for runner, row in runners:
                    replies = [runner.ask(question=question + place) for place in range(2)]
                    if question:
                        row["first"].append(replies[0]["seconds"])
                        row["second"].append(replies[1]["seconds"])
                    row["peak_rss_mib"] = replies[1]["peak_rss_mib"]
        finally:
            for runner, _ in runners:
                runner.close()
    for _, row in runners:
        for kind in ("first", "second"):
            values = np.percentile(row[kind], PERCENTILES) * 1000
            row[f"{kind}_ms"] = dict(zip(map(str, PERCENTILES), values.tolist(), strict=True))
    return rows


def measure_callers(arguments: argparse.Namespace, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Asks through `answer_async` from many tasks, and by one `answer_batch`, in turns; a row for each precision."""
    questions, contexts = [example.question for example in examples], [example.context for example in examples]
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens)
    rows = []
    for name in (name for name in arguments.only if name in OURS):
        directory = arguments.work / name.split()[1]
        with Answerer.from_pretrained(directory, threads=arguments.threads, passage_cache_bytes=0) as answerer:
            row: dict[str, Any] = {"name": name, "batch_seconds": [], "async_seconds": [], "waits": [], "equal": 0}
            for index in range(arguments.rounds + 1):
                started = time.perf_counter()
                expected = answerer.answer_batch(questions, contexts, config=config)
                batch_seconds = time.perf_counter() - started
                started = time.perf_counter()
                pairs = asyncio.run(_ask_all(answerer, examples, arguments.concurrency, config))
                async_seconds = time.perf_counter() - started
                if index == 0:  # warms up
                    continue
                row["batch_seconds"].append(batch_seconds)
                row["async_seconds"].append(async_seconds)
                row["waits"] += [wait for _, wait in pairs]
                got = [answer for answer, _ in pairs]
                row["equal"] += sum(one == other for one, other in zip(got, expected, strict=True))
        values = np.percentile(row["waits"], PERCENTILES)
        row["seconds_waited"] = dict(zip(map(str, PERCENTILES), values.tolist(), strict=True))
        rows.append(row)
    return rows


async def _ask_all(
    answerer: Answerer, examples: Sequence[Example], concurrency: int, config: GenerationConfig
) -> list[tuple[Answer, float]]:
    """The answers, in order, and how long each of them took in seconds."""
    room = asyncio.Semaphore(concurrency)

    async def ask(example: Example) -> tuple[Answer, float]:
        async with room:
            started = time.perf_counter()
            answer = await answerer.answer_async(example.question, example.context, config=config)
            return answer, time.perf_counter() - started

    return await asyncio.gather(*map(ask, examples))


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description="Seconds until one answer is there.")
    add_model_options(parser)
    parser.add_argument("--passages", type=int, default=25, help="the first warms up; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, metavar="N", help="callers that ask qa_onnx at once")
    parser.add_argument("--questions", type=int, default=200, help="of these callers; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of these callers; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    prepare_models(arguments)
    if arguments.concurrency is not None:
        return _write_callers(arguments)
    examples = two_questions(read_squad(arguments.data), arguments.passages)
    settings = Settings(
        directory=str(arguments.work),
        questions=[example.question for example in examples],
        contexts=[example.context for example in examples],
        max_new_tokens=arguments.max_new_tokens,
        stops=False,
        threads=arguments.threads,
        passage_cache=True,
    )
    result = {
        "benchmark": "latency",
        "passages": len(examples) // 2 - 1,
        "max_new_tokens": arguments.max_new_tokens,
        "model": RANDOM if arguments.model is None else arguments.model.name,
        "threads": arguments.threads,
        **describe_machine(),
        "rows": measure(settings, arguments.only),
    }
    return _finish(result, arguments)


def _write_callers(arguments: argparse.Namespace) -> int:
    examples = read_squad(arguments.data)
    examples = random.Random(0).sample(examples, min(arguments.questions, len(examples)))
    result = {
        "benchmark": "callers",
        "questions": len(examples),
        "concurrency": arguments.concurrency,
        "rounds": arguments.rounds,
        "max_new_tokens": arguments.max_new_tokens,
        "model": RANDOM if arguments.model is None else arguments.model.name,
        "threads": arguments.threads,
        **describe_machine(),
        "rows": measure_callers(arguments, examples),
    }
    return _finish(result, arguments)


def _finish(result: dict[str, Any], arguments: argparse.Namespace) -> int:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
