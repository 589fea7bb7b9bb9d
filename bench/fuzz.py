"""A seeded and bounded fuzzer of bundles, inputs and data files: `python -m bench.fuzz -h`. Linux only.

Each case is drawn from its seed and number alone, and runs in a process whose memory is limited. What the library does
with it is held against what README promises: it answers rightly or raises `QAOnnxError`. A finding is

- a crash of the process, or a hang: no result within `TIME_LIMIT_SECONDS`
- an exception that is no `QAOnnxError`, also in a thread or a destructor; a status of the command line but 0, 2, 130
- a peak of memory above `MEMORY_LIMIT_BYTES`
- a wrong result: a span that is not the answer's text, a score that is no probability, an answer that differs in a
  batch, a bundle that was loaded with a wrong checksum or with data from elsewhere
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from bench.mutations import OUTSIDE_NAME, WEIGHTS_NAME, MutableBundle, mutate_bundle
from qa_onnx import Answer, Answerer, EngineConfig, GenerationConfig, QAOnnxError, cli
from qa_onnx.text.constraint import word_boundaries

TIME_LIMIT_SECONDS = 20.0
MEMORY_LIMIT_BYTES = 4 * 2**30
COUNTS = {"bundles": 10_000, "inputs": 10_000, "data": 2_000}
CASES_PER_PROCESS = 250
STATUSES = (0, cli.EXIT_BAD_INPUT, cli.EXIT_INTERRUPTED)
CONTEXT = "The bridge was opened in 1803 and is 412 metres long. It was built by Ada Smith in Oslo."
QUESTIONS = ("When was the bridge opened?", "Who built it?")
DEFAULT_BUNDLE = Path("runs/demo/bundle")

Case = Callable[[Random, Path, Callable[[str], None]], str]
"""Runs one case, given its random numbers, an empty directory and a function to say what the case is; returns
`answered` or `refused`. Whatever it raises is a finding."""


class WrongResultError(Exception):
    """The library gave a result that cannot be right."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A case that went wrong.

    Attributes:
        target: What was fuzzed.
        index: Number of the case.
        kind: `crash`, `hang`, `exception`, `memory` or `wrong`.
        case: What was given.
        message: What happened, in a line.
        details: Traceback, or what the process wrote to standard error.
    """

    target: str
    index: int
    kind: str
    case: str
    message: str
    details: str

    @property
    def signature(self) -> str:
        """The same for findings that probably have one cause: kind, message without what varies, place in the code."""
        places = re.findall(r'File ".*/((?:qa_onnx|training|export)/[^"]+)", line \d+,? in (\w+)', self.details)
        message = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|/\S+", "*", self.message)
        return f"{self.kind}: {message[:100]} ({':'.join(places[-1]) if places else 'outside'})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended: `answered`, `refused` or a kind of finding; its seconds, and the peak of memory in bytes."""

    result: str
    seconds: float
    peak_bytes: int
    finding: Finding | None = None


def check_answer(answer: Answer, context: str, *, extractive: bool = False) -> None:
    """Holds an answer, and its alternatives, against its context.

    Raises:
        WrongResultError: Its span is not its text, its score is no probability, or it is not extractive.
    """
    for found in (answer, *answer.alternatives):
        if not (0 <= found.score <= 1 and 0 <= found.no_answer_probability <= 1 and found.mean_logprob <= 0):
            raise WrongResultError(f"wrong score {found.score}, {found.mean_logprob}, {found.no_answer_probability}")
        if (found.start is None) != (found.end is None):
            raise WrongResultError(f"wrong span: it starts at {found.start} and ends at {found.end}")
        if found.start is not None and context[found.start : found.end] != found.text:
            raise WrongResultError(f"wrong span: {context[found.start : found.end]!r} is not {found.text!r}")
        if not extractive:
            continue
        if not found.text and found.finish_reason != "no_answer":
            raise WrongResultError(f"wrong extractive answer: empty with finish_reason {found.finish_reason!r}")
        starts, ends = word_boundaries(context)
        if found.text and (found.start not in starts or found.end not in ends):
            raise WrongResultError(f"wrong extractive answer: {found.text!r} is not whole words of the context")


def run_cli(arguments: Sequence[str]) -> str:
    """Runs the command line in this process; returns how it ended.

    Raises:
        WrongResultError: It ends with a status of its own, or without a line on standard error.
    """
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), contextlib.redirect_stderr(errors):
        try:
            status = cli.main(arguments)
        except SystemExit as error:  # argparse's
            status = error.code if isinstance(error.code, int) else 1
    said = errors.getvalue()
    if status not in STATUSES or "Traceback" in said or (status == cli.EXIT_BAD_INPUT and not said.strip()):
        raise WrongResultError(f"command line: status {status}, {said[-500:]!r}")
    return "refused" if status else "answered"


def fuzz_bundles(bundle: Path, directory: Path) -> Case:
    """Mutated bundles, loaded and asked."""
    source = directory / "source"
    shutil.copytree(bundle, source)  # so that links to it are on the same file system
    shutil.copy(bundle / WEIGHTS_NAME, directory / OUTSIDE_NAME)

    def case(random: Random, directory: Path, note: Callable[[str], None]) -> str:
        os.link(source.parent / OUTSIDE_NAME, directory / OUTSIDE_NAME)
        mutable = MutableBundle(source, directory / "bundle")
        note(mutate_bundle(random, mutable))
        reset_peak()
        path, extractive = mutable.directory, random.random() < 0.3
        if random.random() < 0.1:
            arguments = ["--question", QUESTIONS[0], "--context", CONTEXT, "--max-new-tokens", "4", "--threads", "1"]
            command = random.choice((["info"], ["answer", *arguments]))
            result = run_cli([*command, "--model", str(path)])
            return result if command == ["info"] else _check_refused(mutable, result)
        try:
            with Answerer.from_pretrained(path, provider="cpu", config=EngineConfig(threads=1)) as answerer:
                config = GenerationConfig(max_new_tokens=4, extractive=extractive)
                for answer in answerer.answer_batch(QUESTIONS, [CONTEXT] * len(QUESTIONS), config=config):
                    check_answer(answer, CONTEXT, extractive=extractive)
        except QAOnnxError:
            return "refused"
        return _check_refused(mutable, "answered")

    return case


def _check_refused(bundle: MutableBundle, result: str) -> str:
    if bundle.must_be_refused and result == "answered":
        raise WrongResultError("a bundle was loaded whose checksums are wrong, or whose data is not its own")
    return result


TARGETS: dict[str, Callable[[Path, Path], Case]] = {"bundles": fuzz_bundles}


def reset_peak() -> None:
    """Has the kernel measure this process's peak of memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def _work(
    pipe: Connection,
    target: str,
    make_case: Callable[[Path, Path], Case],
    bundle: Path,
    seed: int,
    indexes: Sequence[int],
    directory: Path,
    time_limit: float,
    memory_limit: int,
) -> None:
    """A process: runs cases, and sends for each its index, what it is, and its outcome. Ends after a finding."""
    log = (directory / "stderr.log").open("w", encoding="utf-8")
    os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (2 * memory_limit, 2 * memory_limit))
    elsewhere: list[BaseException | None] = []
    threading.excepthook = lambda raised: elsewhere.append(raised.exc_value)
    sys.unraisablehook = lambda raised: elsewhere.append(raised.exc_value)
    case = make_case(bundle, directory)
    for index in indexes:
        pipe.send(index)
        place = directory / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        noted: list[str] = []

        def note(text: str, noted: list[str] = noted) -> None:
            noted.append(text)
            pipe.send(text)

        faulthandler.dump_traceback_later(time_limit * 0.9, file=log)
        reset_peak()
        kind, error, started = "", None, time.monotonic()
        try:
            kind = case(Random(f"{seed} {target} {index}"), place, note)
        except KeyboardInterrupt:
            raise
        except WrongResultError as raised:
            kind, error = "wrong", raised
        except BaseException as raised:  # noqa: BLE001 - a panic of tokenizers is no Exception
            kind, error = "exception", raised
        seconds, peak = time.monotonic() - started, _peak_bytes()
        faulthandler.cancel_dump_traceback_later()
        if error is None and elsewhere and elsewhere[0] is not None:
            kind, error = "exception", elsewhere[0]
        if error is None and peak > memory_limit:
            kind, error = "memory", MemoryError(f"a peak of {peak / 2**30:.1f} GiB")
        finding = None
        if error is not None:
            finding = Finding(
                target=target,
                index=index,
                kind=kind,
                case="; ".join(noted),
                message=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
                details="".join(traceback.format_exception(error)),
            )
        pipe.send(Outcome(result=kind, seconds=seconds, peak_bytes=peak, finding=finding))
        if finding is not None:
            return  # what the case broke must not break the next


def run_cases(
    target: str,
    make_case: Callable[[Path, Path], Case],
    indexes: Sequence[int],
    *,
    bundle: Path,
    seed: int,
    directory: Path,
    time_limit: float = TIME_LIMIT_SECONDS,
    memory_limit: int = MEMORY_LIMIT_BYTES,
) -> Iterator[Outcome]:
    """Runs cases in processes of their own, one after the other; a process ends after a finding.

    Args:
        target: Name of what is fuzzed.
        make_case: Makes it, in the process, of the bundle and a directory for its files.
        indexes: Numbers of the cases.
        bundle: A bundle that is whole.
        seed: Of all cases.
        directory: For files of the processes; is removed, but for the last case's.
        time_limit: Seconds for a case.
        memory_limit: Bytes for a case.
    """
    context = multiprocessing.get_context("spawn")
    remaining = list(indexes)
    while remaining:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        pipe, other = context.Pipe()
        arguments = (other, target, make_case, bundle, seed, remaining, directory, time_limit, memory_limit)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        other.close()
        index, noted, is_case, is_started = remaining[0], [], False, False
        deadline = time.monotonic() + 3 * time_limit  # to start
        try:
            while pipe.poll(max(deadline - time.monotonic(), 0)):
                told = pipe.recv()
                if isinstance(told, Outcome):
                    is_case = False
                    remaining.remove(index)
                    yield told
                elif isinstance(told, int):
                    index, noted, is_case, is_started = told, [], True, True
                    deadline = time.monotonic() + time_limit
                else:
                    noted.append(told)
            kind, message = "hang", f"no result within {time_limit:g} s"
        except EOFError:
            process.join(time_limit)
            kind, message = "", ""
            if process.exitcode is None:
                kind, message = "hang", f"the process does not end within {time_limit:g} s"
            elif process.exitcode != 0:
                status = process.exitcode
                kind, message = "crash", signal.Signals(-status).name if status < 0 else f"exit status {status}"
        finally:
            process.kill()
            process.join()
        if kind:
            said = (directory / "stderr.log").read_text(encoding="utf-8", errors="replace")
            if is_case:
                remaining.remove(index)
            elif not is_started:
                raise RuntimeError(f"{target} does not start: {said[-2000:]}")
            finding = Finding(
                target=target, index=index, kind=kind, case="; ".join(noted), message=message, details=said[-5000:]
            )
            yield Outcome(result=kind, seconds=time_limit, peak_bytes=0, finding=finding)


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
