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
from training.checkpoints import UNFINISHED_NAME, good_checkpoints
from training.report import METRICS_NAME
from training.starter.pretrain import paragraphs_of, train_tokenizer
from training.starter.sample import generate

LONGEST_SECONDS = 120
"""Of one run."""
KILLS_OF_A_RUN = 4
"""A run is killed so often at most, then left to its end."""
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


def kill_trainings(count: int, draw: random.Random, directory: Path) -> dict[str, Any]:
    """Kills small trainings, starts them again, and compares the weights with those of one that nothing disturbed.

    Args:
        count: Of kills; every second one waits until a checkpoint is being written. One disk is full for each ten.
        draw: Decides when.
        directory: Where to write.

    Returns:
        Counts, and what went wrong under `failures`.
    """
    base = _training_command(directory)
    reference, warm = directory / "reference", directory / "warm"
    with redirect_stdout(sys.stderr):  # in this process, so that the forks have all that is imported on first use
        finetune.main([*map(str, base), "--output", str(warm)])
    gc.freeze()  # else each fork's collections would copy all of this process's pages
    started = time.monotonic()
    status = Process(finetune.main, [*base, "--output", reference], directory / "reference.log").status()
    if status != 0 or not _has_equal_results(reference, warm):
        raise RuntimeError("two trainings that nothing disturbs differ")
    longest = time.monotonic() - started
    failures, done = [], {"kills": 0, "while_saving": 0, "runs": 0, "full_disks": 0}

    def start(output: Path, **options: int) -> Process:
        return Process(finetune.main, [*base, "--output", output], output.with_suffix(".log"), **options)

    def check(what: str, output: Path, *, is_right: bool) -> None:
        if not is_right:
            failures.append(f"{what}: {output.name}, {output.with_suffix('.log').read_text()[-2_000:]}")

    def check_end(output: Path, status: int | None) -> None:
        """Whether a run came to its end with the reference's files, weights and scores."""
        check(f"exit status {status}", output, is_right=status == 0 or (output / METRICS_NAME).exists())
        check("other weights", output, is_right=_has_equal_results(output, reference))
        done["runs"] += 1

    while done["kills"] < count and not failures:
        output = directory / f"killed-{done['runs']}"
        process, left = start(output), draw.randint(1, KILLS_OF_A_RUN)
        while left and done["kills"] < count:
            is_saving = done["kills"] % 2 == 1
            if is_saving:
                until = time.monotonic() + draw.uniform(0, longest)
                while time.monotonic() < until or not (output / UNFINISHED_NAME).exists():
                    if process.status(0) is not None:
                        break
                seconds = draw.uniform(0, 0.03)
            else:
                seconds = draw.uniform(0, longest)
            if (status := process.status(seconds)) is not None:
                break
            process.kill()
            done["kills"] += 1
            done["while_saving"] += (output / UNFINISHED_NAME).exists()
            _, damages = good_checkpoints(output)
            check(f"damaged by a kill: {damages}", output, is_right=not damages)
            left -= 1
            process, status = start(output), None
        check_end(output, process.status() if status is None else status)

    for number, size in enumerate(FULL_AT_BYTES[: max(1, count // 10)]):
        output = directory / f"full-{number}"
        process = start(output)
        while process.status(0) is None and not good_checkpoints(output)[0]:
            pass
        process.kill()
        good = good_checkpoints(output)
        status = start(output, largest_file=size).status()
        check(f"exit status {status} on a full disk", output, is_right=status == 2)
        check("a full disk lost a checkpoint", output, is_right=good_checkpoints(output) == good)
        last = output.with_suffix(".log").read_text().rstrip().splitlines()[-1]
        check("more than one line on a full disk", output, is_right=last.startswith("error: "))
        done["full_disks"] += 1
        check_end(output, start(output).status())

    output = directory / "two"
    two = [Process(finetune.main, [*base, "--output", output], directory / f"two-{index}.log") for index in range(2)]
    statuses = [process.status() for process in two]
    (directory / "two.log").write_text("".join((directory / f"two-{index}.log").read_text() for index in range(2)))
    check(f"exit statuses {statuses} of two at once", output, is_right=sorted(map(str, statuses)) == ["0", "2"])
    check_end(output, min(status for status in statuses if status is not None))
    return {**done, "two_at_once": 1, "failures": failures}


def kill_exports(count: int, draw: random.Random, directory: Path) -> dict[str, Any]:
    """Kills exports that replace a bundle; the old or the new one is there at any time, and both are whole.

    Args:
        count: Of kills; of each ten, three wait until the new bundle is about to take its place.
        draw: Decides when.
        directory: Where to write.

    Returns:
        Counts, and what went wrong under `failures`.
    """
    _write_model(directory / "model")
    base = ["--model", directory / "model", "--force"]
    bundles = {name: directory / name for name in ("old", "new")}
    for name, precision in (("old", "int8"), ("new", "fp32")):
        with redirect_stdout(sys.stderr):
            started = time.monotonic()
            if to_onnx.main([*map(str, base), "--precision", precision, "--output", str(bundles[name])]) != 0:
                raise RuntimeError("an export that nothing disturbs does not end")
            longest = time.monotonic() - started
    gc.freeze()
    contents = {name: _contents(path) for name, path in bundles.items()}
    output, log = directory / "bundle", directory / "bundle.log"
    failures: list[str] = []
    done = {"kills": 0, "at_the_rename": 0, "old_left": 0, "new_left": 0, "full_disks": 0}

    def start(**options: int) -> Process:
        log.unlink(missing_ok=True)  # which the limit on files holds for, too
        return Process(to_onnx.main, [*base, "--output", output], log, **options)

    def check(what: str, *, is_right: bool) -> None:
        if not is_right:
            failures.append(f"{what}: {log.read_text()[-2_000:]}")

    def restore() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(bundles["old"], output)

    restore()
    while done["kills"] < count and not failures:
        process, until = start(), time.monotonic() + draw.uniform(0, longest)
        is_late = done["kills"] % 10 < 3
        manifest = directory / ".bundle.staging" / "bundle" / MANIFEST_NAME
        while process.status(0) is None and (not manifest.exists() if is_late else time.monotonic() < until):
            time.sleep(0.0005)
        if is_late:
            time.sleep(draw.uniform(0, 0.05))
        if process.status(0) is not None:
            check("exit status", is_right=process.status(0) == 0)
            restore()
            continue
        process.kill()
        done["kills"] += 1
        done["at_the_rename"] += is_late
        left = [name for name, content in contents.items() if _contents(output) == content]
        check("neither the old nor the new bundle", is_right=bool(left))
        for name in left:
            done[f"{name}_left"] += 1
        if left == ["new"]:
            restore()
    check("exit status after kills", is_right=start().status() == 0 and _contents(output) == contents["new"])
    for size in (1_000, 50_000):
        restore()
        check("exit status on a full disk", is_right=start(largest_file=size).status() == 2)
        check("a full disk lost the old bundle", is_right=_contents(output) == contents["old"])
        done["full_disks"] += 1
    two = [start() for _ in range(2)]
    statuses = sorted(str(process.status()) for process in two)
    check(f"exit statuses {statuses} of two at once", is_right=statuses == ["0", "2"])
    check("another bundle after two at once", is_right=_contents(output) == contents["new"])
    names = sorted(path.name for path in directory.iterdir())
    check(f"left over: {names}", is_right=names == ["bundle", "bundle.log", "model", "new", "old"])
    return {**done, "two_at_once": 1, "failures": failures}


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
    tokenizer = train_tokenizer(paragraphs_of(generate("train", questions=100)), vocab_size=600)
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
