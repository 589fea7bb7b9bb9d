"""The command: `python -m bench.fuzz bundles | inputs | data | all`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.fuzz.runner import Finding, run_cases
from bench.fuzz.targets import TARGETS
from qa_onnx import cli

DEFAULT_BUNDLE = Path("runs/demo/bundle")
CASES_PER_PROCESS = 250
COUNTS = {"bundles": 10_000, "inputs": 10_000, "data": 2_000}


def fuzz(target: str, *, count: int, first: int, seed: int, bundle: Path, output: Path, workers: int) -> dict[str, Any]:
    """Runs the cases of a target and writes each finding to `output`, as a JSON line, as soon as there is one.

    Returns:
        The summary: how many cases ended in which way, and the first finding of each signature.
    """
    results: Counter[str] = Counter()
    found: dict[str, list[Finding]] = {}
    slowest, peak, started = 0.0, 0, time.monotonic()
    chunks = [
        range(start, min(start + CASES_PER_PROCESS, first + count))
        for start in range(first, first + count, CASES_PER_PROCESS)
    ]
    lock = threading.Lock()
    with (output / f"{target}.jsonl").open("w", encoding="utf-8") as file:

        def run_chunk(number: int) -> None:
            nonlocal slowest, peak
            directory = output / f"{target}-{number}"
            for outcome in run_cases(
                target, TARGETS[target], chunks[number], bundle=bundle, seed=seed, directory=directory
            ):
                with lock:
                    results[outcome.result] += 1
                    slowest, peak = max(slowest, outcome.seconds), max(peak, outcome.peak_bytes)
                    if outcome.finding is not None:
                        if outcome.finding.signature not in found:
                            print(f"{target} {outcome.finding.index}: {outcome.finding.signature}", flush=True)
                        found.setdefault(outcome.finding.signature, []).append(outcome.finding)
                        file.write(json.dumps(asdict(outcome.finding)) + "\n")
                        file.flush()
            if count > 1:
                shutil.rmtree(directory)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run_chunk, range(len(chunks))))
    return {
        "target": target,
        "seed": seed,
        "first": first,
        "count": count,
        "results": dict(sorted(results.items())),
        "seconds": round(time.monotonic() - started, 1),
        "slowest_seconds": round(slowest, 2),
        "peak_mib": peak // 2**20,
        "findings": [
            {"signature": signature, "count": len(findings), "index": findings[0].index, "case": findings[0].case[:300]}
            for signature, findings in sorted(found.items())
        ],
    }


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz",
        description="Fuzzes bundles, inputs and data files. Ends with a JSON line each; status 1: there are findings.",
        epilog="One case again: --seed S --first INDEX --count 1, which keeps its files in OUTPUT/TARGET-0/case.",
    )
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--count", type=cli.positive, metavar="N", help=f"cases; default: {COUNTS}")
    parser.add_argument("--first", type=int, default=0, metavar="INDEX", help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, help="made where it is missing; default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=cli.positive, default=os.cpu_count(), metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    arguments = make_parser().parse_args(argv)
    if not arguments.bundle.is_dir():
        from export.to_onnx import export
        from training.model import STARTER

        export(str(STARTER), arguments.bundle)
    arguments.output.mkdir(parents=True, exist_ok=True)
    summaries = [
        fuzz(
            target,
            count=arguments.count or COUNTS[target],
            first=arguments.first,
            seed=arguments.seed,
            bundle=arguments.bundle,
            output=arguments.output,
            workers=arguments.workers,
        )
        for target in (TARGETS if arguments.target == "all" else [arguments.target])
    ]
    for summary in summaries:
        (arguments.output / f"{summary['target']}.json").write_text(
            json.dumps(summary, indent=1) + "\n", encoding="utf-8"
        )
        print(json.dumps(summary))
    return int(any(summary["findings"] for summary in summaries))


if __name__ == "__main__":
    sys.exit(main())
