"""Answers per second, compared with every peer: `python -m bench.throughput --help`.

Every runner is a process of its own with its best batch size. They take turns, all of them once per round, so that
other load on the machine affects all alike; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness import describe_run, publish, start_runners, take_turns
from bench.peers import PLANS_ITS_BATCHES
from bench.prompts import load_model_tokenizer
from bench.runner import RANDOM, Runner, add_model_options, prepare_models
from bench.settings import Settings
from bench.tables import render
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples
from qa_onnx.evaluation.metrics import evaluate

BATCH_SIZES = (8, 16, 32)
TUNING_QUESTIONS = 64
LONG_CONTEXTS, LONG_CONTEXT_QUESTIONS, LONG_CONTEXT_WORDS = 12, 4, 720


def documents(examples: Sequence[Example]) -> list[Example]:
    """All questions on the first 48 passages."""
    passages = set(list(dict.fromkeys(example.context for example in examples))[:48])
    return [example for example in examples if example.context in passages]


def one_question(examples: Sequence[Example]) -> list[Example]:
    """The first question on each of the first 64 passages."""
    return list({example.context: example for example in reversed(examples)}.values())[::-1][:64]


def long_context(examples: Sequence[Example]) -> list[Example]:
    """Four questions on each of 12 contexts of several passages, together about 800 of GPT-2's tokens."""
    by_passage: dict[str, list[Example]] = {}
    for example in examples:
        by_passage.setdefault(example.context, []).append(example)
    found: list[Example] = []
    passages: list[str] = []
    for passage in by_passage:
        words = sum(len(text.split()) for text in [*passages, passage])
        if words > LONG_CONTEXT_WORDS:
            asked = [example for one in passages for example in by_passage[one]]
            context = "\n\n".join(passages)
            if len(asked) >= LONG_CONTEXT_QUESTIONS:
                spread = range(0, len(asked), len(asked) // LONG_CONTEXT_QUESTIONS)
                found += [replace(asked[index], context=context) for index in spread][:LONG_CONTEXT_QUESTIONS]
            passages = []
        if len(found) == LONG_CONTEXTS * LONG_CONTEXT_QUESTIONS:
            break
        passages.append(passage)
    return found


WORKLOADS: dict[str, Callable[[Sequence[Example]], Sequence[Example]]] = {
    "documents": documents,
    "one-question": one_question,
    "long-context": long_context,
    "natural": lambda examples: examples,
}


def best_batch_size(name: str, settings: Settings, directory: Path) -> int:
    """The batch size of most answers per second on the first questions; a first question warms up."""
    few = Settings(
        **{
            **vars(settings),
            "questions": settings.questions[:TUNING_QUESTIONS],
            "contexts": settings.contexts[:TUNING_QUESTIONS],
        }
    )
    runner = Runner(name, few, directory)
    try:
        runner.ask(batch_size=BATCH_SIZES[0])
        seconds = {size: runner.ask(batch_size=size)["seconds"] for size in BATCH_SIZES}
    finally:
        runner.close()
    return min(seconds, key=lambda size: seconds[size])


def measure(
    settings: Settings, names: Sequence[str], *, rounds: int, examples: Sequence[Example] = ()
) -> list[dict[str, Any]]:
    """Runs all runners in turns.

    Args:
        settings: What all of them get.
        names: Of `bench.peers.RUNNERS`.
        rounds: How often each answers all questions.
        examples: The questions with their gold answers, where a trained model's answers are to be evaluated.

    Returns:
        A row per runner.
    """
    with start_runners(names, settings) as (rows, runners), tempfile.TemporaryDirectory() as directory:
        measured = [row for row in rows if row["name"] in runners]
        for row in measured:
            name = row["name"]
            runners[name].ask(question=0)  # warms up
            plans = name.startswith(PLANS_ITS_BATCHES)
            row["batch_size"] = settings.batch_size if plans else best_batch_size(name, settings, Path(directory))
            print(f"{name}: loaded in {row['load_seconds']:.1f} s, batch size {row['batch_size']}", flush=True)

        def ask(row: dict[str, Any], index: int) -> dict[str, Any]:
            reply = runners[row["name"]].ask(batch_size=row["batch_size"], tokens=index == 0)
            print(f"round {index + 1}, {row['name']}: {reply['seconds']:.2f} s", flush=True)
            return reply

        replies = take_turns({row["name"]: partial(ask, row) for row in measured}, rounds=rounds)
    reference = replies["transformers fp32"][0]["tokens"] if "transformers fp32" in replies else None
    for row in measured:
        found = replies[row["name"]]
        row["seconds"] = [reply["seconds"] for reply in found]
        row["peak_rss_mib"] = found[-1]["peak_rss_mib"]
        row["answers_per_second"] = statistics.median(len(settings.questions) / value for value in row["seconds"])
        row |= agreement(found[0]["tokens"], reference) if reference is not None else {}
        row |= quality(found[0]["tokens"], examples, settings) if examples else {}
    return rows


def quality(tokens: Sequence[Sequence[int]], examples: Sequence[Example], settings: Settings) -> dict[str, float]:
    """Exact match and F1 of the answers to `examples`, in percent."""
    tokenizer = load_model_tokenizer(settings)
    texts = {example.id: tokenizer.decode(ids).strip() for example, ids in zip(examples, tokens, strict=True)}
    scores = evaluate(examples, texts)
    return {"exact_match": scores.exact_match, "f1": scores.f1}


def agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, float]:
    """Shares of equal answers and of equal tokens at the same place, in percent."""
    pairs = list(zip(tokens, reference, strict=True))
    equal = sum(left == right for one, other in pairs for left, right in zip(one, other, strict=False))
    total = sum(max(len(one), len(other)) for one, other in pairs)
    return {
        "equal_answers_percent": 100 * sum(one == other for one, other in pairs) / len(pairs),
        "equal_tokens_percent": 100 * equal / max(total, 1),
    }


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description="Answers per second, compared with peers."
    )
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    add_model_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    prepare_models(arguments)
    examples = WORKLOADS[arguments.workload](read_examples(arguments.data))
    settings = Settings(
        directory=str(arguments.work),
        questions=[example.question for example in examples],
        contexts=[example.context for example in examples],
        max_new_tokens=arguments.max_new_tokens,
        stops=arguments.workload == "natural",
        threads=arguments.threads,
    )
    result = describe_run(
        "throughput",
        workload=arguments.workload,
        questions=len(examples),
        passages=len({example.context for example in examples}),
        max_new_tokens=arguments.max_new_tokens,
        model=RANDOM if arguments.model is None else arguments.model.name,
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    result["rows"] = measure(
        settings, arguments.only, rounds=arguments.rounds, examples=examples if settings.stops else ()
    )
    publish(result, render(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
