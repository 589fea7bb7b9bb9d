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
        started, used = time.monotonic(), 0.0
        try:
            while True:
                limit = time_limit if is_case else START_SECONDS
                if time.monotonic() > started + PATIENCE * limit or _used_seconds(process.pid) > used + limit:
                    break
                if not pipe.poll(limit / 20):
                    continue
                told = pipe.recv()
                if isinstance(told, Outcome):
                    is_case = False
                    remaining.remove(index)
                    yield told
                elif isinstance(told, int):
                    index, noted, is_case, is_started = told, [], True, True
                    started, used = time.monotonic(), _used_seconds(process.pid)
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
