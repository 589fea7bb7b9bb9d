"""Runs cases in processes of limited memory and time, and says what went wrong in each."""

from __future__ import annotations

import faulthandler
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from bench.machine import peak_rss_mib, reset_peak

TIME_LIMIT_SECONDS = 20.0
"""Of processor time; `PATIENCE` times as long on the clock, for a machine that does other things."""
PATIENCE = 3
START_SECONDS = 60.0
"""For a process to start, of processor time."""
MEMORY_LIMIT_BYTES = 4 * 2**30

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
        # A traceback has the innermost call at its end, faulthandler at the start.
        innermost = 0 if self.kind in ("crash", "hang") else -1
        places = re.findall(r'File ".*/((?:qa_onnx|training|export)/[^"]+)", line \d+,? in (\w+)', self.details)
        message = re.sub(r"'[^']*'|\"[^\"]*\"|[\d.]+|/\S+", "*", self.message)
        return f"{self.kind}: {message[:100]} ({':'.join(places[innermost]) if places else 'outside'})"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended: `answered`, `refused` or a kind of finding; its seconds, and the peak of memory in bytes."""

    result: str
    seconds: float
    peak_bytes: int
    finding: Finding | None = None


def _used_seconds(pid: int | None) -> float:
    """Processor time of a process; 0 after its end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    with pipe:
        case = make_case(bundle, directory)
        for index in indexes:
            pipe.send(index)
            faulthandler.dump_traceback_later(time_limit * 0.9, repeat=True, file=log)
            outcome = _run_case(case, target, index, seed, directory / "case", pipe.send, memory_limit, elsewhere)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(outcome)
            if outcome.finding is not None:
                return  # what the case broke must not break the next


def _run_case(
    case: Case,
    target: str,
    index: int,
    seed: int,
    place: Path,
    tell: Callable[[str], None],
    memory_limit: int,
    elsewhere: Sequence[BaseException | None],
) -> Outcome:
    """Runs one case in this process; `elsewhere` gets what is raised in other threads and in destructors."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    noted: list[str] = []

    def note(text: str) -> None:
        noted.append(text)
        tell(text)

    reset_peak()
    result, error, started = "", None, time.monotonic()
    try:
        result = case(Random(f"{seed} {target} {index}"), place, note)
    except KeyboardInterrupt:
        raise
    except WrongResultError as raised:
        result, error = "wrong", raised
    except BaseException as raised:  # noqa: BLE001 - a panic of tokenizers is no Exception
        result, error = "exception", raised
    seconds, peak = time.monotonic() - started, int(peak_rss_mib() * 2**20)
    if error is None and elsewhere:
        result, error = "exception", elsewhere[0]
    if error is None and peak > memory_limit:
        result, error = "memory", MemoryError(f"a peak of {peak / 2**30:.1f} GiB")
    finding = None
    if error is not None:
        finding = Finding(
            target=target,
            index=index,
            kind=result,
            case="; ".join(noted),
            message=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            details="".join(traceback.format_exception(error)),
        )
    return Outcome(result=result, seconds=seconds, peak_bytes=peak, finding=finding)


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
        make_case: Makes the function that runs a case, in the process, from the bundle and a directory for its files.
        indexes: Numbers of the cases.
        bundle: A complete bundle.
        seed: Of all cases.
        directory: For files of the processes; only those of the last process are kept.
        time_limit: Seconds for a case.
        memory_limit: Bytes for a case.
    """
    remaining = list(indexes)
    while remaining:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        arguments = (target, make_case, bundle, seed, remaining, directory, time_limit, memory_limit)
        process = _CaseProcess(arguments, time_limit)
        try:
            for outcome in process.outcomes():
                remaining.remove(process.index)
                yield outcome
            problem = process.find_problem()
        finally:
            process.kill()
        if problem is None:
            continue
        said = (directory / "stderr.log").read_text(encoding="utf-8", errors="replace")
        if process.is_in_case:
            remaining.remove(process.index)
        elif not process.has_started:
            raise RuntimeError(f"{target} does not start: {said[-2000:]}")
        kind, message = problem
        case = "; ".join(process.noted)
        finding = Finding(
            target=target, index=process.index, kind=kind, case=case, message=message, details=said[-5000:]
        )
        yield Outcome(result=kind, seconds=time_limit, peak_bytes=0, finding=finding)


class _CaseProcess:
    """A process that runs cases (`_work`).

    Attributes:
        index: Number of the case that runs, or has run last.
        noted: What the case said about itself.
        is_in_case: Whether a case is running.
        has_started: Whether the process began its first case.
    """

    def __init__(self, arguments: tuple[Any, ...], time_limit: float) -> None:
        """Starts the process; `arguments` are those of `_work` after the pipe."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()
        self._time_limit = time_limit
        self._has_timed_out = False
        self._started, self._used = time.monotonic(), 0.0
        self.index, self.is_in_case, self.has_started = -1, False, False
        self.noted: list[str] = []

    def outcomes(self) -> Iterator[Outcome]:
        """The outcomes of the cases until the process ends or exceeds its time."""
        while True:
            limit = self._time_limit if self.is_in_case else START_SECONDS
            used = _used_seconds(self._process.pid) - self._used
            if time.monotonic() > self._started + PATIENCE * limit or used > limit:
                self._has_timed_out = True
                return
            if not self._pipe.poll(limit / 20):
                continue
            try:
                told = self._pipe.recv()
            except EOFError:
                return
            if isinstance(told, Outcome):
                self.is_in_case = False
                yield told
            elif isinstance(told, int):
                self.index, self.noted, self.is_in_case, self.has_started = told, [], True, True
                self._started, self._used = time.monotonic(), _used_seconds(self._process.pid)
            else:
                self.noted.append(told)

    def find_problem(self) -> tuple[str, str] | None:
        """The kind and the message of what ended the process; None where it ended by itself."""
        if self._has_timed_out:
            return "hang", f"no result within {self._time_limit:g} s"
        self._process.join(self._time_limit)
        status = self._process.exitcode
        if status is None:
            return "hang", f"the process does not end within {self._time_limit:g} s"
        if status != 0:
            return "crash", signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return None

    def kill(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
