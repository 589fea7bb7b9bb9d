"""Kills commands at random moments and checks that nothing is lost: `python -m bench.kills --help`.

Each run is a fork of this process, which has imported everything already: a start takes a tenth of that of a program.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

# Before any import: neither threads nor CUDA live on in a fork.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from bench.models import SEED
from export import to_onnx
from qa_onnx.bundle import Bundle
from qa_onnx.errors import BundleError
from qa_onnx.manifest import MANIFEST_NAME
from training import finetune
from training.checkpoints import UNFINISHED_NAME, complete_checkpoints
from training.report import METRICS_NAME
from training.starter.pretrain import list_paragraphs, train_tokenizer
from training.starter.sample import generate

LONGEST_SECONDS = 120
"""Maximum time of one run."""
KILLS_OF_A_RUN = 4
"""Maximum number of kills of one run."""
FULL_AT_BYTES = (1_000, 20_000, 200_000, 400_000)
"""Sizes at which a file of a training becomes too large: the settings, the tokenizer, the weights, the optimizer."""


class Process:
    """A command of this project in a fork of this process; what it writes goes to the end of a log."""

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        arguments: Sequence[object],
        log: Path,
        *,
        largest_file: int = resource.RLIM_INFINITY,
    ) -> None:
        """Starts it; a file of more than `largest_file` bytes fails as on a full disk."""
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid:
            return
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
            status = main([str(argument) for argument in arguments])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:  # noqa: BLE001 - a fork must not come back; excepthook writes the traceback to the log
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            status = 70
        os._exit(status)

    def status(self, seconds: float = LONGEST_SECONDS) -> int | None:
        """Waits for its end; its exit status, negative after a signal, or None where it takes longer."""
        until = time.monotonic() + seconds
        while self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                break
            else:
                time.sleep(0.001)
        return self._status

    def kill(self) -> None:
        """Kills it at once, where it has not ended."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self.status()


class Failures:
    """What went wrong, each with the end of the log of the run in which it did."""

    def __init__(self) -> None:
        """Starts with none."""
        self.found: list[str] = []

    def check(self, what: str, log: Path, *, is_right: bool) -> None:
        """Notes what went wrong, unless it is right."""
        if not is_right:
            self.found.append(f"{what}: {log.name}, {log.read_text()[-2_000:]}")


class TrainingKills:
    """Trainings that are killed, and the undisturbed one that they are compared with."""

    def __init__(self, draw: random.Random, directory: Path) -> None:
        """Trains once in this process, so that forks have all imports, and once in a fork, the reference."""
        self.draw, self.directory = draw, directory
        self.failures = Failures()
        self.done = {"kills": 0, "while_saving": 0, "runs": 0, "full_disks": 0}
        self.base = _training_command(directory)
        self.reference, warm = directory / "reference", directory / "warm"
        with redirect_stdout(sys.stderr):
            finetune.main([*map(str, self.base), "--output", str(warm)])
        gc.freeze()  # else each fork's collections would copy all of this process's pages
        started = time.monotonic()
        if self.start(self.reference).status() != 0 or not _has_equal_results(self.reference, warm):
            raise RuntimeError("two undisturbed trainings differ")
        self.longest = time.monotonic() - started

    def start(self, output: Path, log: Path | None = None, **options: int) -> Process:
        """Starts a training that writes to `output`."""
        arguments = [*self.base, "--output", output]
        return Process(finetune.main, arguments, log or output.with_suffix(".log"), **options)

    def check(self, what: str, output: Path, *, is_right: bool) -> None:
        """Notes what went wrong with the run to `output`."""
        self.failures.check(what, output.with_suffix(".log"), is_right=is_right)

    def check_end(self, output: Path, status: int | None) -> None:
        """Checks that a run has ended with the files, weights and scores of the reference."""
        self.check(f"exit status {status}", output, is_right=status == 0 or (output / METRICS_NAME).exists())
        self.check("other weights", output, is_right=_has_equal_results(output, self.reference))
        self.done["runs"] += 1

    def kill_run(self, count: int) -> None:
        """Kills one training several times, until `count` kills were made in all, and lets it end."""
        output = self.directory / f"killed-{self.done['runs']}"
        process, left = self.start(output), self.draw.randint(1, KILLS_OF_A_RUN)
        while left and self.done["kills"] < count:
            seconds = self._wait_for_saving(process, output) if self.done["kills"] % 2 else self._draw_seconds()
            if (status := process.status(seconds)) is not None:
                break
            process.kill()
            self.done["kills"] += 1
            self.done["while_saving"] += (output / UNFINISHED_NAME).exists()
            _, damages = complete_checkpoints(output)
            self.check(f"damaged by a kill: {damages}", output, is_right=not damages)
            left -= 1
            process, status = self.start(output), None
        self.check_end(output, process.status() if status is None else status)

    def _draw_seconds(self) -> float:
        return self.draw.uniform(0, self.longest)

    def _wait_for_saving(self, process: Process, output: Path) -> float:
        """Waits until a checkpoint is being written; returns the seconds until the kill."""
        until = time.monotonic() + self._draw_seconds()
        while time.monotonic() < until or not (output / UNFINISHED_NAME).exists():
            if process.status(0) is not None:
                break
        return self.draw.uniform(0, 0.03)

    def fill_disk(self, output: Path, size: int) -> None:
        """Has a training continue on a disk that is full at files of `size` bytes, then on one that is not."""
        process = self.start(output)
        while process.status(0) is None and not complete_checkpoints(output)[0]:
            pass
        process.kill()
        good = complete_checkpoints(output)
        status = self.start(output, largest_file=size).status()
        self.check(f"exit status {status} on a full disk", output, is_right=status == 2)
        self.check("a full disk lost a checkpoint", output, is_right=complete_checkpoints(output) == good)
        last = output.with_suffix(".log").read_text().rstrip().splitlines()[-1]
        self.check("more than one line on a full disk", output, is_right=last.startswith("error: "))
        self.done["full_disks"] += 1
        self.check_end(output, self.start(output).status())

    def start_two(self, output: Path) -> None:
        """Starts two trainings that write to one directory: one of them is refused."""
        logs = [output.with_name(f"two-{index}.log") for index in range(2)]
        two = [self.start(output, log) for log in logs]
        statuses = [process.status() for process in two]
        output.with_suffix(".log").write_text("".join(log.read_text() for log in logs))
        self.check(
            f"exit statuses {statuses} of two at once", output, is_right=sorted(map(str, statuses)) == ["0", "2"]
        )
        self.check_end(output, min(status for status in statuses if status is not None))


def kill_trainings(count: int, draw: random.Random, directory: Path) -> dict[str, Any]:
    """Kills small trainings, starts them again, and compares the weights with those of an undisturbed training.

    Args:
        count: Number of kills; every second one waits until a checkpoint is being written. For every ten of them, one
            training meets a full disk.
        draw: Decides when.
        directory: Where to write.

    Returns:
        Counts, and what went wrong under `failures`.
    """
    runs = TrainingKills(draw, directory)
    while runs.done["kills"] < count and not runs.failures.found:
        runs.kill_run(count)
    for number, size in enumerate(FULL_AT_BYTES[: max(1, count // 10)]):
        runs.fill_disk(directory / f"full-{number}", size)
    runs.start_two(directory / "two")
    return {**runs.done, "two_at_once": 1, "failures": runs.failures.found}


class ExportKills:
    """Exports that replace a bundle and are killed; the bundle is the old or the new one at any time."""

    def __init__(self, draw: random.Random, directory: Path) -> None:
        """Exports the old and the new bundle."""
        self.draw, self.directory = draw, directory
        self.failures = Failures()
        self.done = {"kills": 0, "at_the_rename": 0, "old_left": 0, "new_left": 0, "full_disks": 0}
        _write_model(directory / "model")
        self.base = ["--model", directory / "model", "--force"]
        self.old, self.output, self.log = directory / "old", directory / "bundle", directory / "bundle.log"
        self.contents: dict[str, dict[str, str]] = {}
        for name, precision in (("old", "int8"), ("new", "fp32")):
            started = time.monotonic()
            arguments = [*self.base, "--precision", precision, "--output", directory / name]
            with redirect_stdout(sys.stderr):
                if to_onnx.main([str(argument) for argument in arguments]) != 0:
                    raise RuntimeError("an undisturbed export failed")
            self.longest = time.monotonic() - started
            self.contents[name] = _contents(directory / name)
        gc.freeze()

    def start(self, **options: int) -> Process:
        """Starts an export of the new bundle."""
        self.log.unlink(missing_ok=True)  # the limit on the size of files applies to it, too
        return Process(to_onnx.main, [*self.base, "--output", self.output], self.log, **options)

    def check(self, what: str, *, is_right: bool) -> None:
        """Notes what went wrong."""
        self.failures.check(what, self.log, is_right=is_right)

    def restore(self) -> None:
        """Puts the old bundle back."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.copytree(self.old, self.output)

    def kill(self) -> None:
        """Kills one export; of each ten, three when the new bundle is about to be renamed."""
        process, until = self.start(), time.monotonic() + self.draw.uniform(0, self.longest)
        is_late = self.done["kills"] % 10 < 3
        manifest = self.directory / ".bundle.staging" / "bundle" / MANIFEST_NAME
        while process.status(0) is None and (not manifest.exists() if is_late else time.monotonic() < until):
            time.sleep(0.0005)
        if is_late:
            time.sleep(self.draw.uniform(0, 0.05))
        if process.status(0) is not None:
            self.check("exit status", is_right=process.status(0) == 0)
            self.restore()
            return
        process.kill()
        self.done["kills"] += 1
        self.done["at_the_rename"] += is_late
        left = [name for name, content in self.contents.items() if _contents(self.output) == content]
        self.check("neither the old nor the new bundle", is_right=bool(left))
        for name in left:
            self.done[f"{name}_left"] += 1
        if left == ["new"]:
            self.restore()

    def fill_disk(self, size: int) -> None:
        """Exports to a disk that is full at files of `size` bytes."""
        self.restore()
        self.check("exit status on a full disk", is_right=self.start(largest_file=size).status() == 2)
        self.check("a full disk lost the old bundle", is_right=_contents(self.output) == self.contents["old"])
        self.done["full_disks"] += 1

    def check_is_new(self, what: str) -> None:
        """Checks that the bundle is the new one."""
        self.check(what, is_right=_contents(self.output) == self.contents["new"])


def kill_exports(count: int, draw: random.Random, directory: Path) -> dict[str, Any]:
    """Kills exports that replace a bundle; arguments and result are those of `kill_trainings`."""
    runs = ExportKills(draw, directory)
    runs.restore()
    while runs.done["kills"] < count and not runs.failures.found:
        runs.kill()
    runs.check("exit status after kills", is_right=runs.start().status() == 0)
    runs.check_is_new("another bundle after kills")
    for size in (1_000, 50_000):
        runs.fill_disk(size)
    statuses = sorted(str(process.status()) for process in [runs.start() for _ in range(2)])
    runs.check(f"exit statuses {statuses} of two at once", is_right=statuses == ["0", "2"])
    runs.check_is_new("another bundle after two at once")
    names = sorted(path.name for path in directory.iterdir())
    runs.check(f"left over: {names}", is_right=names == ["bundle", "bundle.log", "model", "new", "old"])
    return {**runs.done, "two_at_once": 1, "failures": runs.failures.found}


def _contents(bundle: Path) -> dict[str, str]:
    """The checksums of a bundle's files, all of which were verified; empty where it is not whole."""
    try:
        files = Bundle.open(bundle).manifest.files
    except BundleError:
        return {}
    return {name: listed["sha256"] for name, listed in files.items()}


def _training_command(directory: Path) -> list[object]:
    """Arguments for a training of 8 steps that saves at each and evaluates at every third."""
    _write_model(directory / "model")
    (directory / "data.json").write_text(json.dumps(generate("train", questions=32)), encoding="utf-8")
    sources = ["--model", directory / "model", "--train", directory / "data.json", "--eval", directory / "data.json"]
    limits = ["--max-steps", 8, "--save-steps", 1, "--eval-steps", 3, "--limit-eval", 2, "--max-new-tokens", 4]
    return [*sources, *limits, "--batch-size", 4, "--learning-rate", 1e-3, "--cache-dir", directory / "cache"]


def _write_model(directory: Path) -> None:
    """A GPT-2 of two layers with random weights."""
    tokenizer = train_tokenizer(list_paragraphs(generate("train", questions=100)), vocab_size=600)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(SEED)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=2, n_head=2, eos_token_id=0)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    GPT2LMHeadModel(config).save_pretrained(directory)


def _has_equal_results(first: Path, second: Path) -> bool:
    """Whether weights are equal in all bits, and evaluations and answers, too."""
    if not all((path / METRICS_NAME).exists() for path in (first, second)):
        return False
    weights, expected = (load_file(path / "model.safetensors") for path in (first, second))
    results = [
        (json.loads((path / METRICS_NAME).read_text())["evaluations"], (path / "predictions.json").read_text())
        for path in (first, second)
    ]
    equal = all(torch.equal(weights[name], expected[name]) for name in expected)
    return equal and weights.keys() == expected.keys() and results[0] == results[1]


PARTS: dict[str, Callable[[int, random.Random, Path], dict[str, Any]]] = {
    "training": kill_trainings,
    "export": kill_exports,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints a line of JSON, and returns 1 where something was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kills", description="Kill commands at random moments and check that nothing is lost."
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--count", type=int, default=50, metavar="N", help="kills; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="decides when; default: %(default)s")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qa-onnx-kills-") as directory:
        result = PARTS[arguments.part](arguments.count, random.Random(arguments.seed), Path(directory))
    summary = {"part": arguments.part, "seed": arguments.seed, **result, "seconds": round(time.monotonic() - started)}
    print(json.dumps(summary))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
