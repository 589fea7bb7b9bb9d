"""Runs a command as a program does: exit statuses, signals, and one line of error instead of a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from qa_onnx.errors import QAOnnxError, one_line

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def run_command(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command of this project as a program does: with exit statuses, and one line instead of a traceback.

    SIGTERM ends it as Ctrl-C does, by `KeyboardInterrupt`, so that whatever was begun is tidied up.

    Args:
        command: Returns its exit status; None is 0.
        interrupted: What to say after Ctrl-C or SIGTERM.

    Returns:
        The command's status, 2 with one line on standard error for bad input, or 130 after Ctrl-C or SIGTERM.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    if sys.stdout is None:
        sys.stderr.write("error: standard output is closed; expected a file or a terminal. To drop it: > /dev/null\n")
        return EXIT_BAD_INPUT
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except QAOnnxError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{'. '.join([interrupted, *getattr(error, '__notes__', [])])}\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader went away, as in `| head`: nothing is left to say, and no one to say it to
        _flush_or_drop_output()
        return 0
    except OSError as error:  # such as a full disk, under standard output or elsewhere
        sys.stderr.write(f"error: {one_line(error)}; expected a place that can be read and written, with room\n")
        _flush_or_drop_output()
        return EXIT_BAD_INPUT
    finally:
        signal.signal(signal.SIGTERM, before)


def _flush_or_drop_output() -> None:
    """Writes what is left of standard output; where that fails, the interpreter will not try it again at its exit."""
    try:
        sys.stdout.flush()
    except OSError:  # said already, or the reader went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
