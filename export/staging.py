"""Staging directories: an export writes into them, and they take their final names only once everything is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qa_onnx.errors import InvalidInputError
from qa_onnx.files import REPLACED_SUFFIX
from qa_onnx.lock import folder_lock

STAGING_MARK = ".qa_onnx_export"
"""A file that marks a staging directory as made by an export, which may therefore be deleted."""
DISK_SPACE_FACTOR = 4
"""Free disk an export needs, in sizes of the weights: Optimum's graph, the fp32 graphs, the bundle's, and a margin."""


def check_replaceable(path: Path, *, force: bool, marker: str) -> None:
    """Checks that an export may write to a path: nothing is there, or an earlier export that `force` replaces.

    Args:
        path: The target directory.
        force: Whether an existing export may be replaced.
        marker: The file that tells an export from other directories.

    Raises:
        InvalidInputError: Something else is there, or an export without `force`.
    """
    if path.is_symlink():
        raise InvalidInputError(f"{path} is a link to nothing; remove it, or choose another --output")
    if not path.exists():
        return
    if not force:
        raise InvalidInputError(f"{path} exists; choose another --output, or replace it with --force")
    if not (path / marker).is_file():
        raise InvalidInputError(f"{path} exists and is not an export ({marker} is missing); --force will not delete it")


@contextmanager
def stage(*outputs: Path, weight_bytes: int) -> Iterator[list[Path]]:
    """Makes a staging directory, a hidden sibling of the first output, and deletes it at the end in any case.

    The directory that both are in is made where it is missing, as a training does.
    A lock allows one export at a time to each output. What a killed export left is cleared first.

    Args:
        outputs: The directories to make.
        weight_bytes: Size of the model, from which the disk space is estimated.

    Yields:
        The path of each output in the staging directory; they are not created.

    Raises:
        InvalidInputError: The staging directory cannot be made, or the disk is full, before or during the export.
    """
    output = outputs[0]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{output.parent} cannot be made ({error.strerror}); choose another --output"
        ) from error
    free = shutil.disk_usage(output.parent).free
    if free < weight_bytes * DISK_SPACE_FACTOR:
        raise InvalidInputError(
            f"{output.parent} has {free / 1e6:.0f} MB free; exporting {weight_bytes / 1e6:.0f} MB of weights needs "
            f"{weight_bytes * DISK_SPACE_FACTOR / 1e6:.0f} MB. Free some, or choose an --output on another disk"
        )
    staging = output.with_name(f".{output.name}.staging")
    parts = [staging / path.name for path in outputs]
    with folder_lock(output.with_name(f".{output.name}.lock"), what=f"an export to {output}"):
        try:
            _clear(staging, dict(zip(parts, outputs, strict=True)))
            staging.mkdir()
            (staging / STAGING_MARK).touch()
        except OSError as error:
            raise InvalidInputError(f"{staging} cannot be made ({error.strerror}); choose another --output") from error
        with _report_full_disk(output.parent):
            try:
                yield parts
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _clear(staging: Path, targets: Mapping[Path, Path]) -> None:
    """Deletes a staging directory, and restores targets that a killed export had moved into it.

    Args:
        staging: Need not exist.
        targets: The final path of each directory that is made in it.

    Raises:
        InvalidInputError: It was not made by an export.
    """
    if not os.path.lexists(staging):
        return
    if not (staging / STAGING_MARK).is_file() and (
        not staging.is_dir() or staging.is_symlink() or any(staging.iterdir())
    ):
        raise InvalidInputError(f"{staging} exists and was not made by an export; move it, or choose another --output")
    for part, target in targets.items():
        replaced = part.with_name(part.name + REPLACED_SUFFIX)
        if replaced.is_dir() and not target.exists():
            replaced.rename(target)
    shutil.rmtree(staging)


@contextmanager
def _report_full_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InvalidInputError(
                f"the disk of {directory} is full; nothing was written. Free some space, or choose an --output "
                "on another disk"
            ) from error
        raise
