"""What the measurements share: contestants that take turns, the description of a run, and where its result goes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bench.machine import describe_machine
from bench.runner import Runner
from bench.settings import Settings
from qa_onnx.files import write_file

T = TypeVar("T")


@contextmanager
def start_runners(names: Sequence[str], settings: Settings) -> Iterator[tuple[list[dict[str, Any]], dict[str, Runner]]]:
    """Starts a runner for each name, and ends them all at the end.

    Args:
        names: Of `bench.peers.RUNNERS`.
        settings: What all of them get.

    Yields:
        A row for each name, with `name` and `status`, `measured` or the reason why it is not; and the runners that are
        measured, by name.
    """
    rows: list[dict[str, Any]] = []
    runners: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory() as directory:
        try:
            for name in names:
                runner = Runner(name, settings, Path(directory))
                if runner.missing is None:
                    runners[name] = runner
                    rows.append({"name": name, "status": "measured", "load_seconds": runner.load_seconds})
                else:
                    rows.append({"name": name, "status": f"not installed ({runner.missing})", "load_seconds": None})
            yield rows, runners
        finally:
            for runner in runners.values():
                runner.close()


def take_turns(contestants: Mapping[str, Callable[[int], T]], *, rounds: int) -> dict[str, list[T]]:
    """Runs all contestants once per round (A B A B), so that other load on the machine affects all of them alike.

    Args:
        contestants: Called with the number of the round, by name.
        rounds: How often.

    Returns:
        What each returned, in the order of the rounds.
    """
    found: dict[str, list[T]] = {name: [] for name in contestants}
    for index in range(rounds):
        for name, run in contestants.items():
            found[name].append(run(index))
    return found


def median_seconds(call: Callable[[], object], *, repeats: int) -> float:
    """The median duration of some calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def describe_run(benchmark: str, **values: Any) -> dict[str, Any]:
    """A result without its measurements: the name of the benchmark, its settings, the machine and the versions."""
    return {"benchmark": benchmark, **values, **describe_machine()}


def publish(result: dict[str, Any], table: str, output: Path | None) -> None:
    """Prints the table of a result, and writes its JSON to a file; where none is given, it is the last line."""
    print(table)
    if output is None:
        print(json.dumps(result, ensure_ascii=False))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
