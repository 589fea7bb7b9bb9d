"""The output directory of a run: refused, locked, begun, resumed and finished.

`metrics.json` is written last: with it a run is finished. A run that was killed before that resumes from its last
checkpoint. A kill after it leaves nothing but checkpoints, which the next start in that directory deletes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa_onnx.errors import InvalidInputError
from qa_onnx.files import write_file
from qa_onnx.lock import folder_lock
from training.checkpoints import (
    BEST_PREFIX,
    CHECKSUMS_NAME,
    UNFINISHED_NAME,
    complete_checkpoints,
    delete_checkpoints,
    list_checkpoints,
)
from training.report import METRICS_NAME, write_json
from training.settings import RESUMABLE_CHANGES
from training.trainer import BAD_BATCH_NAME, TENSORBOARD_NAME

CONFIG_NAME, LOCK_NAME = "training_config.json", "training.lock"
PARTIAL_PATTERN = ".*.partial"
"""Files that `write_file` was killed in."""


def lock_output(output: Path) -> AbstractContextManager[None]:
    """Creates the output directory, and keeps other trainings out of it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"--output {output} cannot be created ({error.strerror}); expected a place with write permission"
        ) from error
    return folder_lock(output / LOCK_NAME, what=f"a training in {output}")


def check_output(output: Path) -> None:
    """Refuses an output directory that holds anything but the beginning of a run.

    Raises:
        InvalidInputError: It is a file, holds a finished run, or other files.
    """
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"--output {output} is a file; expected a directory that is new or empty")
    if not output.is_dir():
        return
    if (output / METRICS_NAME).exists():
        raise InvalidInputError(f"--output {output} holds a finished run; choose another directory")
    written: tuple[str, ...] = (
        CONFIG_NAME,
        LOCK_NAME,
        UNFINISHED_NAME,
        PARTIAL_PATTERN,
        BAD_BATCH_NAME.format("*"),
        TENSORBOARD_NAME,
    )
    if (output / CONFIG_NAME).exists():  # it is written before any of these
        written += (f"{PREFIX_CHECKPOINT_DIR}-*", f"{BEST_PREFIX}-*")
    others = [path.name for path in output.iterdir() if not any(path.match(pattern) for pattern in written)]
    if others and not any((path / CHECKSUMS_NAME).is_file() for path in list_checkpoints(output).values()):
        raise InvalidInputError(
            f"--output {output} exists and is not empty ({others[0]} is in it); choose another directory"
        )


def clear_finished_run(output: Path) -> None:
    """Deletes the checkpoints of a finished run, which are there if it was killed at its very end."""
    if not (output / METRICS_NAME).exists():
        return
    directories = [*list_checkpoints(output).values(), *list_checkpoints(output, BEST_PREFIX).values()]
    others = [path for path in directories if not (path / CHECKSUMS_NAME).is_file()]
    if len(directories) > len(others) or (output / UNFINISHED_NAME).exists():
        with lock_output(output):
            delete_checkpoints(output, kept=others)


def find_checkpoints(output: Path, settings: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """The checkpoints that a run with these settings can resume from, the oldest first; and what is wrong with others.

    Raises:
        InvalidInputError: There are checkpoints, of which none is complete, or which are of other settings or data.
    """
    checkpoints, damages = complete_checkpoints(output)
    if not checkpoints and damages:
        raise InvalidInputError(
            f"{damages[-1]}. No checkpoint in {output} is good, and none was deleted. Restore one from a backup, or "
            "start in another directory"
        )
    if checkpoints:
        _check_same_run(output, settings)
    return checkpoints, damages


def begin_run(output: Path, settings: dict[str, Any], checkpoints: Sequence[Path], damages: Sequence[str]) -> None:
    """Says which checkpoint a run resumes from, deletes what a kill left half-written, and writes the settings."""
    for damage in damages:
        sys.stderr.write(f"warning: {damage}\n")
    if checkpoints:
        sys.stderr.write(f"resuming from {checkpoints[-1]}\n")
    shutil.rmtree(output / UNFINISHED_NAME, ignore_errors=True)
    for path in output.glob(PARTIAL_PATTERN):
        path.unlink()
    write_json(output / CONFIG_NAME, settings)


def copy_model(source: Path, output: Path) -> None:
    """Copies the files of a complete directory, the model of the best evaluation, to the output directory."""
    for path in sorted(source.iterdir()):
        if path.name != CHECKSUMS_NAME:
            write_file(output / path.name, path.read_bytes())


def _check_same_run(output: Path, settings: dict[str, Any]) -> None:
    """Refuses to resume where the checkpoints are of other settings or data."""
    path = output / CONFIG_NAME
    try:
        began = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{output} has checkpoints, and {path} cannot be read ({error}); the settings that the run began with are "
            "in it. Restore it, or start in another directory"
        ) from error
    changed = [
        f"{name} was {began.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if name not in RESUMABLE_CHANGES and began.get(name) != value
    ]
    if changed:
        raise InvalidInputError(
            f"--output {output} holds the checkpoints of another run: {'; '.join(changed)}. Give the settings and the "
            "data that it began with, or start in another directory"
        )
