"""How long one caller waits for one answer: `python -m bench.latency --help`.

Each runner is asked two questions on a passage that it has not seen, one after the other, then the next runner, then
the next passage. qa_onnx remembers the passage for the second question, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe_machine
from bench.peers import Settings
from bench.report import latency_table
from bench.runner import RANDOM, Runner, add_model_options, prepare_models
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


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description="Seconds until one answer is there.")
    add_model_options(parser)
    parser.add_argument("--passages", type=int, default=25, help="the first warms up; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    prepare_models(arguments)
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
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(latency_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
