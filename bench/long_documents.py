"""Whether answers are found in long documents: `python -m bench.long_documents --help`.

Each question is asked about its own passage at a random position among passages of other articles. For comparison: the
passage alone, and an oracle that reads only the window of the document with the answer.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import publish
from bench.machine import describe_machine, peak_rss_mib, reset_peak
from bench.questions import add_question_options, read_answerable
from qa_onnx import Answerer, EngineConfig, GenerationConfig, InvalidInputError
from qa_onnx.bundle import Bundle
from qa_onnx.cli import run_command
from qa_onnx.data.example import Example
from qa_onnx.evaluation.metrics import evaluate
from qa_onnx.text.windows import Window, encode_windows

OTHERS = (0, 1, 3, 12, 50)
BETWEEN = "\n\n"


def make_documents(examples: Sequence[Example], others: int, *, seed: int) -> list[tuple[str, int]]:
    """For each question a document and the character at which its own passage starts there.

    Raises:
        InvalidInputError: The other articles have fewer than `others` passages.
    """
    draw = random.Random(seed)
    titles = {example.context: example.title for example in examples}
    documents = []
    for example in examples:
        foreign = [context for context, title in titles.items() if title != example.title]
        if len(foreign) < others:
            raise InvalidInputError(
                f"question {example.id} has {len(foreign)} passages of other articles; expected at least {others}. "
                "Give more data, with titles"
            )
        passages = draw.sample(foreign, others)
        place = draw.randint(0, others)
        before = "".join(passage + BETWEEN for passage in passages[:place])
        after = "".join(BETWEEN + passage for passage in passages[place:])
        documents.append((before + example.context + after, len(before)))
    return documents


def measure(
    bundle: Path,
    examples: Sequence[Example],
    *,
    others: Sequence[int],
    threads: int | None,
    config: GenerationConfig,
    seed: int,
) -> dict[str, Any]:
    """Asks every question about documents of each size.

    Args:
        bundle: Written by `export.to_onnx`.
        examples: All questions have an answer.
        others: How many passages of other articles a document has.
        threads: As of `EngineConfig`.
        config: How to answer; its windows are the bundle's where it has none.
        seed: Of the documents.

    Returns:
        For each size exact match and F1, of the oracle, too, seconds, windows, and peak memory in MiB.
    """
    opened = Bundle.open(bundle)
    settings = opened.manifest.window_settings.with_given(window=config.window, stride=config.stride)
    with Answerer.from_pretrained(bundle, provider="cpu", config=EngineConfig(threads=threads)) as answerer:
        rows = []
        for count in others:
            documents = make_documents(examples, count, seed=seed)
            windows = encode_windows(
                opened.load_tokenizer(),
                [example.question for example in examples],
                [text for text, _ in documents],
                max_positions=opened.manifest.max_positions,
                max_new_tokens=config.max_new_tokens,
                settings=settings,
            )
            rows.append({"others": count, **_measure_documents(answerer, examples, documents, windows, config)})
    return {
        "questions": len(examples),
        "precision": opened.manifest.precision,
        "windows": asdict(settings),
        "config": asdict(config),
        "rows": rows,
        **describe_machine(),
    }


def _measure_documents(
    answerer: Answerer,
    examples: Sequence[Example],
    documents: Sequence[tuple[str, int]],
    windows: Sequence[Sequence[Window]],
    config: GenerationConfig,
) -> dict[str, Any]:
    """Asks every question about its document, and about the window of it that holds the answer."""
    questions = [example.question for example in examples]
    reset_peak()
    started = time.perf_counter()
    answers = answerer.answer_batch(questions, [text for text, _ in documents], config=config, progress=True)
    seconds, peak = time.perf_counter() - started, peak_rss_mib()
    parts = [
        _find_window(example, start, found)
        for example, (_, start), found in zip(examples, documents, windows, strict=True)
    ]
    oracle = answerer.answer_batch(questions, parts, config=config, progress=True)
    return {
        **_scores(examples, [answer.text for answer in answers]),
        "oracle": _scores(examples, [answer.text for answer in oracle]),
        "no_answer": sum(answer.finish_reason == "no_answer" for answer in answers),
        "windows": sum(answer.windows for answer in answers) / len(answers),
        "characters": sum(len(text) for text, _ in documents) / len(documents),
        "seconds": seconds,
        "peak_mib": peak,
    }


def _find_window(example: Example, start: int, windows: Sequence[Window]) -> str:
    """The text of the first window that holds the answer; a text without the answer, where none does.

    Args:
        example: The question.
        start: The character of the document at which its passage starts.
        windows: Of the document.
    """
    first = start + example.answers[0].start
    last = first + len(example.answers[0].text)
    return next((one.text for one in windows if one.start <= first and last <= one.start + len(one.text)), "-")


def _scores(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    scores = evaluate(examples, {example.id: text for example, text in zip(examples, texts, strict=True)})
    return {"exact_match": scores.exact_match, "f1": scores.f1}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    alone = next((row["exact_match"] for row in result["rows"] if row["others"] == 0), None)
    lines = [
        "| other passages | windows | exact match | of the passage alone | F1 | oracle window | s | peak MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        share = f"{100 * row['exact_match'] / alone:.0f} %" if alone else ""
        lines.append(
            f"| {row['others']} | {row['windows']:.1f} | {row['exact_match']:.1f} | {share} | {row['f1']:.1f} | "
            f"{row['oracle']['exact_match']:.1f} | {row['seconds']:.1f} | {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.long_documents",
        description="Ask about passages alone, and among passages of other articles, in one long document.",
    )
    add_question_options(parser, questions=200, seed=0)
    parser.add_argument("--others", type=int, nargs="+", default=OTHERS, metavar="N", help="default: 0 1 3 12 50")
    parser.add_argument("--window", type=int, metavar="N", help="default: the bundle's")
    parser.add_argument(
        "--no-answer-threshold", type=float, metavar="X", help="default: the bundle's; 1 answers every question"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status (see `qa_onnx.cli.run_command`)."""
    arguments = make_parser().parse_args(argv)
    return run_command(lambda: _measure_and_publish(arguments))


def _measure_and_publish(arguments: argparse.Namespace) -> None:
    config = GenerationConfig(
        extractive=arguments.extractive, window=arguments.window, no_answer_threshold=arguments.no_answer_threshold
    )
    result = measure(
        arguments.model,
        read_answerable(arguments),
        others=arguments.others,
        threads=arguments.threads,
        config=config,
        seed=arguments.seed,
    )
    publish(result, table(result), arguments.output)


if __name__ == "__main__":
    sys.exit(main())
