"""Bulk answering, measured: `python -m bench.bulk --model BUNDLE --data SQUAD/dev.json`.

Two parts. Speed: `answer-file` in a process of its own, from its start to its end, against `answer_batch` in this one,
in turns. Memory: the peak of `answer-file` on files of synthetic rows of which one has several times as many rows as
the other; it should be the same.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.harness import publish
from bench.machine import describe_machine
from qa_onnx import Answerer, EngineConfig
from qa_onnx.cli import positive
from qa_onnx.data.example import Example
from qa_onnx.data.reader import read_examples
from qa_onnx.files import check_outputs

CHILD = """
import sys
from bench.machine import peak_rss_mib
from qa_onnx.cli import main
status = main(sys.argv[1:])
print(peak_rss_mib())
sys.exit(status)
"""
ROOT = Path(__file__).parent.parent
MILLION = 1_000_000
MEMORY_NEW_TOKENS = 1
QUESTIONS_PER_CONTEXT = 50
NOTE_BYTES = 1_000
"""Of a column that is only kept, so that files are large and answers quick."""
WORDS = "river bridge tower castle harbor valley forest market garden station built opened near old long".split()


def measure_speed(arguments: argparse.Namespace, examples: Sequence[Example], directory: Path) -> dict[str, Any]:
    """Answers per second of both, round by round; each round has the other order."""
    source = directory / "questions.parquet"
    questions, contexts = [example.question for example in examples], [example.context for example in examples]
    pq.write_table(
        pa.table({"id": [example.id for example in examples], "question": questions, "context": contexts}), source
    )
    seconds: dict[str, list[float]] = {"answer_batch": [], "answer-file": [], "answer-file, its start": []}
    processor_seconds: dict[str, list[float]] = {"answer_batch": [], "answer-file": []}
    equal = 0
    config = EngineConfig(threads=arguments.threads, prefix_cache_bytes=0)  # contexts of the round before are not kept
    with Answerer.from_pretrained(arguments.model, config=config) as answerer:
        answerer.answer_batch(questions[:64], contexts[:64], max_new_tokens=arguments.max_new_tokens)
        for number in range(arguments.rounds):
            for name in ("answer_batch", "answer-file")[:: 1 if number % 2 == 0 else -1]:
                started, computed = time.monotonic(), _processor_seconds()
                if name == "answer_batch":
                    answers = answerer.answer_batch(questions, contexts, max_new_tokens=arguments.max_new_tokens)
                else:
                    _answer_file(arguments, source, directory / f"round-{number}")
                seconds[name].append(time.monotonic() - started)
                processor_seconds[name].append(_processor_seconds() - computed)
            started = time.monotonic()
            _answer_file(arguments, source, directory / f"round-{number}")  # all is there: the start and the checks
            seconds["answer-file, its start"].append(time.monotonic() - started)
            found = pq.read_table(directory / f"round-{number}").select(["answer", "score"]).to_pylist()
            equal = sum(
                row == {"answer": answer.text, "score": answer.score}
                for row, answer in zip(found, answers, strict=True)
            )
    rates = {name: round(len(examples) / statistics.median(times), 1) for name, times in seconds.items()}
    ratios = _ratios(seconds)
    return {
        "questions": len(examples),
        "equal": equal,
        "answers_per_second": {name: rates[name] for name in ("answer_batch", "answer-file")},
        "start_seconds": round(statistics.median(seconds["answer-file, its start"]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_of_processor_time": round(statistics.median(_ratios(processor_seconds)), 3),
        "processor_seconds": {
            name: [round(value, 2) for value in values] for name, values in processor_seconds.items()
        },
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
    }


def _ratios(seconds: dict[str, list[float]]) -> list[float]:
    """For each round, the speed of answer-file relative to answer_batch."""
    return [a / b for a, b in zip(seconds["answer_batch"], seconds["answer-file"], strict=True)]


def _processor_seconds() -> float:
    """What this process and those that it waited for have computed: other work on the machine changes it less."""
    return sum(os.times()[:4])


def measure_memory(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """The peak of each number of rows, and how long they took."""
    results = []
    for rows in arguments.memory_rows:
        source = directory / f"{rows}.parquet"
        write_synthetic(source, rows)
        started = time.monotonic()
        peak = _answer_file(arguments, source, directory / f"out-{rows}", max_new_tokens=MEMORY_NEW_TOKENS)
        taken = time.monotonic() - started
        results.append(
            {
                "rows": rows,
                "new_tokens": MEMORY_NEW_TOKENS,
                "input_mib": round(source.stat().st_size / 2**20, 1),
                "peak_mib": round(peak),
                "seconds": round(taken, 1),
                "million_rows_hours": round(taken / rows * MILLION / 3600, 2),
            }
        )
    return results


def write_synthetic(path: Path, rows: int) -> None:
    """Writes rows with short contexts, each asked about several times, in one row group: the hardest to stream."""
    schema = pa.schema([("id", pa.int64()), *[(name, pa.string()) for name in ("question", "context", "note")]])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(pa.Table.from_pylist(list(_synthetic(rows)), schema), row_group_size=rows)


def _synthetic(rows: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    context = ""
    for index in range(rows):
        if index % QUESTIONS_PER_CONTEXT == 0:
            context = " ".join(draw.choices(WORDS, k=12)).capitalize() + f" {index}."
        note = draw.randbytes(NOTE_BYTES // 2).hex()
        yield {"id": index, "question": f"Which {draw.choice(WORDS)} is it?", "context": context, "note": note}


def _answer_file(
    arguments: argparse.Namespace, source: Path, output: Path, *, max_new_tokens: int | None = None
) -> float:
    """Runs `answer-file` in a process of its own; returns its peak memory in MiB."""
    tokens = max_new_tokens or arguments.max_new_tokens
    given = ["--model", arguments.model, "--input", source, "--output", output, "--max-new-tokens", tokens]
    if arguments.threads is not None:
        given += ["--threads", arguments.threads]
    command = [sys.executable, "-c", CHILD, "answer-file", *map(str, given)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def _table(result: dict[str, Any]) -> str:
    lines = []
    if "speed" in result:
        speed = result["speed"]
        lines += ["| | answers/s |", "| --- | ---: |"]
        lines += [f"| {name} | {rate} |" for name, rate in speed["answers_per_second"].items()]
        lines += [
            f"\n{speed['equal']} of {speed['questions']} answers and scores are equal. answer-file has "
            f"{speed['ratio']:.1%} of the speed, its start and its checks of {speed['start_seconds']} s included; by "
            f"processor time {speed['ratio_of_processor_time']:.1%}.\n"
        ]
    lines += [
        "| rows | new tokens | input MiB | peak MiB | s | hours of a million |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(lines + [f"| {' | '.join(f'{value:,}' for value in row.values())} |" for row in result["memory"]])


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description="Measure bulk answering.")
    parser.add_argument("--model", required=True, type=Path, metavar="BUNDLE", help="written by export.to_onnx")
    parser.add_argument("--data", type=Path, metavar="FILE", help="SQuAD file; default: measure the memory only")
    parser.add_argument("--questions", type=positive, default=3000, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--memory-rows", type=positive, nargs="*", default=[50_000, 200_000], metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: one per physical core")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    check_outputs({"--output": arguments.output}, {"--data": arguments.data, "--model": arguments.model})
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if arguments.data is not None:
            examples = read_examples(arguments.data)[: arguments.questions]
            result["speed"] = measure_speed(arguments, examples, Path(name))
        result["memory"] = measure_memory(arguments, Path(name))
    result |= {"max_new_tokens": arguments.max_new_tokens, "threads": arguments.threads, **describe_machine()}
    publish(result, _table(result), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
