"""Reading text files, and writing files and directories: whole or not at all, and only over what may be replaced."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qa_onnx.errors import InvalidInputError

AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2
"""Constants of Linux's renameat2(2)."""
MAX_TEXT_BYTES = 2**30
"""Maximum size of a file that is read into memory."""
PIPE_SECONDS = 10.0
"""Maximum time that a pipe may have no reader before it is an error to write to it."""
REPLACED_SUFFIX = "-replaced"
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def read_text(path: str | Path, *, expected: str) -> str:
    """Reads a text file in UTF-8, without its byte order mark; line ends stay as they are.

    Args:
        path: The file.
        expected: What the file should be, for the message of an error, such as "a JSON file".

    Raises:
        InvalidInputError: The file cannot be read, is not UTF-8, or has more than `MAX_TEXT_BYTES`.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)  # a pipe or a device does not say how much it has
        if len(data) > MAX_TEXT_BYTES:
            raise InvalidInputError(
                f"{path}: has more than {MAX_TEXT_BYTES / 2**30:.3g} GiB; expected {expected} of at most that. Split it"
            )
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: byte {error.start} is not UTF-8; expected {expected} in UTF-8") from error


def public_name(path: str | Path) -> str:
    """A path as it may be published: directories outside the working directory tell the names of users and machines.

    Args:
        path: Of a file or directory; anything else, such as the id of a model on the hub, stays as it is.

    Returns:
        The path relative to the working directory where it is inside of it, else its last part. Bytes that are not
        UTF-8 are replaced.
    """
    name, here = os.path.normpath(path), Path.cwd()
    if name == os.curdir or Path(name).is_absolute() or name.startswith(os.pardir):
        absolute = Path(os.path.normpath(here / name))
        # Above home directories, such as in /, a relative path would tell whose it is.
        is_public = absolute.is_relative_to(here) and absolute != here and here not in Path("~").expanduser().parents
        name = str(absolute.relative_to(here)) if is_public else absolute.name
    return os.fsencode(name).decode(errors="replace")


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | Sequence[Path] | None]) -> None:
    """Checks that output files can be written, before the work whose results go there.

    Args:
        outputs: Each option with its file; None where it was not given.
        inputs: Files that are read, likewise, one or several; of a directory, such as a bundle, the files in it.

    Raises:
        InvalidInputError: An output is a directory, cannot be written, or is the same file as an input or another
            output.
    """
    others = [
        (option, path)
        for option, given in inputs.items()
        for path in ([given] if isinstance(given, Path) else given or [])
    ]
    for option, path in outputs.items():
        if path is None:
            continue
        try:
            _check_output(option, path, others)
        except OSError as error:  # such as a directory of another user, or a name that is too long
            raise InvalidInputError(f"{option} {path}: cannot be written ({error.strerror})") from error
        others.append((option, path))


def _check_output(option: str, path: Path, others: Sequence[tuple[str, Path]]) -> None:
    for other, given in others:
        for file in _files_of(given):
            if _is_same_file(path, file):
                raise InvalidInputError(f"{option} {path} is the same file as {other} {file}; expected another file")
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidInputError(f"{option} {path}: cannot be written; expected a file in a directory that exists")
    places = [path] if path.exists() else []
    if _is_replaceable(path):
        places.append(Path(os.path.realpath(path)).parent)
    if not all(os.access(place, os.W_OK) for place in places):
        raise InvalidInputError(f"{option} {path}: cannot be written; expected a place with write permission")


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all.

    A link stays a link, and its target is written. An existing file keeps its mode. A device or a pipe is written to;
    a pipe may have no reader yet for `PIPE_SECONDS`. Text is written in UTF-8.

    Raises:
        InvalidInputError: The file cannot be written; what was there is unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if not _is_replaceable(path):  # opened by its own name: /dev/stdout is a link to a pipe that has no path
            with os.fdopen(_open_device(path), "wb") as device:
                device.write(data)
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            # Exclusive, so that it follows no link; opened rather than made by tempfile, so that the umask counts.
            with partial.open("xb") as file:
                file.write(data)
                if target.exists():
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error.strerror}); expected a place with room and write permission"
        ) from error


def partial_of(target: Path) -> Path:
    """Where `keep_lines` keeps what is to go to a file."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def keep_lines(target: Path) -> Iterator[Callable[[str], None]]:
    """Keeps results as they come, in `{target}.partial`, until the whole file has been written.

    Gives a function that appends a line. The partial file is deleted where the block succeeds; where it fails, what was
    computed is in it, and a note of the error says so. Where the target is a device, nothing is kept.

    Raises:
        InvalidInputError: The partial file is there already, or cannot be written.
    """
    if not _is_replaceable(target) and not target.is_fifo():
        yield lambda _: None
        return
    path = partial_of(target)
    try:
        if not path.is_symlink() and path.is_file() and not path.stat().st_size:
            path.unlink()  # of a run that was killed before its first line
        file = path.open("x", encoding="utf-8")  # which follows no link
    except FileExistsError as error:
        raise InvalidInputError(
            f"{path}: is there already, and may hold the results of a run that was interrupted. Move or delete it"
        ) from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be written ({error.strerror})") from error

    def append(line: str) -> None:
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise InvalidInputError(f"{path}: cannot be written ({error.strerror}); expected room") from error

    try:
        yield append
    except BaseException as error:
        if path.stat().st_size:
            error.add_note(f"What was computed before is in {path}")
        else:
            path.unlink()
        raise
    else:
        path.unlink()
    finally:
        with contextlib.suppress(OSError):  # what could not be written was an error before
            file.close()


def set_default_modes(directory: Path) -> None:
    """Gives a directory and all files in it the modes that the umask asks for; some libraries write theirs as 0600."""
    probe = directory / f".mode-{secrets.token_hex(4)}"
    probe.touch(mode=0o666, exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            path.chmod(mode | (mode & 0o444) >> 2)  # who may read a directory may also enter it
        elif not path.is_symlink():
            path.chmod(mode)


def sync_tree(directory: Path) -> None:
    """Waits until a directory with all its files is on the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def put_in_place(directory: Path, target: Path, *, replace: bool) -> None:
    """Renames a finished directory to its place, in one step.

    Args:
        directory: On the same file system as `target`. What was replaced is under its name afterwards, or, where the
            system cannot exchange two directories, under its name with `REPLACED_SUFFIX`.
        target: Where it goes.
        replace: Whether a directory that is there may be replaced. The two are exchanged in one step where the system
            can (Linux' renameat2), so that there is the old one or the new one at any time.

    Raises:
        InvalidInputError: Something is at `target` and may not be replaced; it is unchanged.
        OSError: The rename failed.
    """
    sync_tree(directory)
    if replace and target.is_dir():
        if not _rename(directory, target, RENAME_EXCHANGE):
            replaced = directory.with_name(directory.name + REPLACED_SUFFIX)
            target.rename(replaced)
            try:
                directory.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
    else:
        try:
            if not _rename(directory, target, RENAME_NOREPLACE):
                target.mkdir()  # exclusive; a rename over an empty directory replaces it in one step
                directory.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise InvalidInputError(
                f"{target} was created meanwhile by another program; it is unchanged. Choose another --output, or "
                "replace it with --force"
            ) from error
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Renames with a flag of renameat2; False where the system or the file system has none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _is_replaceable(path: Path) -> bool:
    """Whether a new file may take the path's place: nothing or a regular file is there, no device or pipe.

    Raises:
        InvalidInputError: It cannot be seen, as with links that lead to each other.
    """
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be written ({error.strerror}); expected another place") from error


def _files_of(given: Path) -> list[Path]:
    """A file itself, and of a directory the files in it: a bundle, or a data set of some splits."""
    if not given.is_dir():
        return [given]
    return [path for pattern in ("*", "*/*") for path in given.glob(pattern) if path.is_file()]


def _open_device(path: Path) -> int:
    """Opens a device or a pipe to be written to; returns its descriptor."""
    until = time.monotonic() + PIPE_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > until:
                raise OSError(error.errno, "nobody reads the pipe", str(path)) from error
            time.sleep(0.01)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


def _is_same_file(first: Path, second: Path) -> bool:
    if first.exists() and second.exists():
        return first.samefile(second)
    return os.path.realpath(first) == os.path.realpath(second)
