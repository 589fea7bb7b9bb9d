"""Milliseconds until the second question on a passage is answered: plain graph, kernels, and with look-ahead.

    python -m bench.look_ahead --bundle BUNDLE --data SQUAD/dev.json --output look-ahead.json

The three load the same bundle in one process and take turns at each question. Answers end where the model ends them, or
with `--max-new-tokens N --ignore-eos` after so many tokens, for models without training: those copy nothing from the
passage, and what look-ahead costs in vain can be seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import describe_run, publish
from bench.latency import two_questions
from bench.tables import render
from qa_onnx import Answerer, EngineConfig, GenerationConfig
from qa_onnx.bundle import Bundle
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples

SETUPS = {
    "plain graph": {"kernels": "off", "look_ahead": False},
    "kernels": {"kernels": "required", "look_ahead": False},
    "kernels, look-ahead": {"kernels": "required", "look_ahead": True},
}


def measure(
    bundle: Path, examples: Sequence[Example], config: GenerationConfig, *, threads: int
) -> list[dict[str, Any]]:
    """Asks two questions on each passage, one after the other; returns a row for each setup.

    Args:
        bundle: Of a precision that has a plain graph.
        examples: From `two_questions`; the first passage warms up.
        config: How to answer.
        threads: As of `EngineConfig`.
    """
    answerers = {
        name: Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(threads=threads, **options))
        for name, options in SETUPS.items()
    }
    rows: dict[str, dict[str, Any]] = {name: {"name": name, "seconds": [], "answers": []} for name in SETUPS}
    for index, example in enumerate(examples):
        for name, answerer in answerers.items():
            started = time.perf_counter()
            answer = answerer.answer(example.question, example.context, config=config)
            if index % 2 and index > 1:
                rows[name]["seconds"].append(time.perf_counter() - started)
                rows[name]["answers"].append(answer)
    expected = rows["kernels"]["answers"]
    for name, answerer in answerers.items():
        row, stats = rows[name], answerer.stats().engine
        pairs = zip(row.pop("answers"), expected, strict=True)
        row["equal_percent"] = 100 * statistics.mean(one == other for one, other in pairs)
        row["p50_ms"] = 1000 * statistics.median(row["seconds"])
        row["steps_each"] = stats.decode_steps / len(examples)
        row["draft_tokens"], row["accepted_draft_tokens"] = stats.draft_tokens, stats.accepted_draft_tokens
        answerer.close()
    return list(rows.values())


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.look_ahead", description="Milliseconds until a second question on a passage is answered."
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="written by export.to_onnx")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="SQuAD file")
    parser.add_argument("--passages", type=int, default=100, help="the first warms up; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of exactly so many tokens")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON with every sample")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    config = GenerationConfig(max_new_tokens=arguments.max_new_tokens, ignore_eos=arguments.ignore_eos)
    manifest = Bundle.open(arguments.bundle).manifest
    examples = two_questions(read_examples(arguments.data), arguments.passages)
    result = describe_run(
        "look-ahead",
        model=Path(manifest.source_model).name,
        precision=manifest.precision,
        passages=len(examples) // 2 - 1,
        max_new_tokens=arguments.max_new_tokens,
        ignore_eos=arguments.ignore_eos,
        threads=arguments.threads,
    )
    result["rows"] = measure(arguments.bundle, examples, config, threads=arguments.threads)
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
