"""Checkpoints that are complete or not there, and verified by content before anything in them is opened.

A directory is written under another name, together with the SHA-256 of each of its files, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qa_onnx.errors import InvalidInputError, QAOnnxError, one_line
from qa_onnx.files import put_in_place, read_text, set_default_modes, write_file

CHECKSUMS_NAME = "checksums.json"
"""The SHA-256 of each other file of a checkpoint, by its path in there."""
UNFINISHED_NAME = ".unfinished"
"""Where checkpoints are until they are complete; the next start deletes what a kill leaves there."""
BEST_PREFIX = "best"
"""Of the directories with the weights of the best evaluation so far, and its answers."""
TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""In the RuntimeError that `torch.save` raises where other writers raise an OSError."""


class TrainingError(QAOnnxError):
    """Training cannot continue: the loss is not a number any more, or the memory or the disk is full."""


def list_checkpoints(output: Path, prefix: str = PREFIX_CHECKPOINT_DIR) -> dict[int, Path]:
    """The directories `{prefix}-{step}` by step, the oldest first; somebody's copies have other names."""
    steps = {path.name.removeprefix(f"{prefix}-"): path for path in output.glob(f"{prefix}-*")}
    return dict(sorted((int(step), path) for step, path in steps.items() if step.isdecimal() and path.is_dir()))


def finish_checkpoint(output: Path, name: str) -> Path:
    """Completes the directory of that name in `UNFINISHED_NAME` and renames it to its place; returns that.

    Raises:
        OSError: The disk is full.
        InvalidInputError: Likewise.
    """
    directory = output / UNFINISHED_NAME / name
    set_default_modes(directory)
    write_file(directory / CHECKSUMS_NAME, json.dumps(_checksums(directory), indent=1))
    put_in_place(directory, output / name, replace=True)
    shutil.rmtree(output / UNFINISHED_NAME)
    return output / name


def delete_checkpoints(output: Path, *, kept: Container[Path]) -> None:
    """Deletes the others, and other weights that once were the best; a kill leaves none of them half there."""
    unfinished = output / UNFINISHED_NAME
    for prefix in (PREFIX_CHECKPOINT_DIR, BEST_PREFIX):
        for path in list_checkpoints(output, prefix).values():
            if path not in kept:
                unfinished.mkdir(exist_ok=True)
                path.rename(unfinished / path.name)
    shutil.rmtree(unfinished, ignore_errors=True)


def complete_checkpoints(output: Path) -> tuple[list[Path], list[str]]:
    """Verifies all checkpoints, each with the best weights that it knows of.

    Returns:
        Those that a run can resume from, the oldest first; and what is wrong with each other one.
    """
    good, damages = [], []
    for path in list_checkpoints(output).values():
        damage = _find_damage(path) or _find_best_damage(path)
        if damage is None:
            good.append(path)
        else:
            damages.append(f"{path} cannot be used: {damage}")
    return good, damages


def list_evaluations(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Epoch, step, exact match and F1 (in percent) of each evaluation that Trainer logged."""
    return [
        {"epoch": row["epoch"], "step": row["step"], "exact_match": row["eval_exact_match"], "f1": row["eval_f1"]}
        for row in log_history
        if "eval_f1" in row
    ]


def find_best_evaluation(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation with the best F1, the last among equals; None of none."""
    return max(evaluations, key=lambda row: (row["f1"], row["step"]), default=None)


@contextmanager
def report_disk_errors(output: Path) -> Iterator[None]:
    """Reports in one line that a disk is full, whatever library wrote to it, and deletes what is unfinished.

    Raises:
        TrainingError: It is, or `output` cannot be written for another reason.
    """
    try:
        yield
    except (OSError, InvalidInputError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITER):
            raise
        shutil.rmtree(output / UNFINISHED_NAME, ignore_errors=True)
        free, (good, _) = shutil.disk_usage(output).free, complete_checkpoints(output)
        raise TrainingError(
            f"{output} cannot be written ({one_line(error)}); {free / 1e6:.0f} MB are free there. The last good "
            f"checkpoint: {good[-1] if good else 'none was written yet'}. Free some disk, then start the same command "
            "again"
        ) from error


def _find_damage(directory: Path) -> str | None:
    """What is wrong with a directory that `finish_checkpoint` completed; None where it is as it was written."""
    marker = directory / CHECKSUMS_NAME
    try:
        expected = json.loads(read_text(marker, expected="the checksums of its files"))
        found = _checksums(directory)
    except InvalidInputError as error:
        return one_line(error)
    except (ValueError, RecursionError):
        return f"{marker} is damaged; expected JSON"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    if not isinstance(expected, dict):
        return f"{marker} is damaged; expected a JSON object"
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{directory / name} is missing"
        if name not in expected:
            return f"{directory / name} is not of this checkpoint; move it away"
        if found[name] != expected[name]:
            return f"{directory / name} is damaged, its SHA-256 is not that in {CHECKSUMS_NAME}"
    return None


def _find_best_damage(checkpoint: Path) -> str | None:
    """What is wrong with the best weights that were there when a checkpoint was written."""
    path = checkpoint / TRAINER_STATE_NAME
    try:
        best = find_best_evaluation(
            list_evaluations(json.loads(read_text(path, expected="a JSON file"))["log_history"])
        )
        return None if best is None else _find_damage(checkpoint.with_name(f"{BEST_PREFIX}-{best['step']}"))
    except InvalidInputError as error:
        return one_line(error)
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged ({one_line(error)})"


def _checksums(directory: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / CHECKSUMS_NAME:
            with path.open("rb") as file:
                sums[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
