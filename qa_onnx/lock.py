"""One process at a time in an output folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qa_onnx.errors import InvalidInputError


@contextmanager
def folder_lock(path: Path, *, what: str) -> Iterator[None]:
    """Holds a lock file while the block runs, and removes it afterwards.

    The kernel frees the lock (flock) when its process ends, however it ends: a file that a killed process left is
    locked again without a word.

    Args:
        path: The lock file; the PID of the process that holds it is in it. Its directory exists.
        what: What the lock is for, for the message of an error, such as "a training in runs/model".

    Raises:
        InvalidInputError: Another process holds it, or it cannot be written.
    """
    try:
        descriptor = _acquire(path, what=what)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be locked ({error.strerror}); expected a place with room and write permission"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, *, what: str) -> int:
    """Opens and locks the file; returns its descriptor, which no program that this one starts inherits."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):  # else the holder removed it after it was opened here
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise InvalidInputError(
                f"{what} is already running, in process {holder or 'unknown'} ({path} is locked). Wait for its end, "
                "stop it, or choose another output"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
