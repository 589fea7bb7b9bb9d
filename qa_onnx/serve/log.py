"""Logs as lines of JSON: one a request on standard output, events on standard error. No text of a request, no key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO


def write_line(values: dict[str, Any], stream: TextIO | None = None) -> None:
    """Writes a line with the time; a reader that went away, or a full disk, does not stop the service."""
    line = json.dumps({"time": _now(), **values}) + "\n"
    stream = stream or sys.stdout
    try:
        stream.write(line)
        stream.flush()
    except OSError:  # a log that cannot be written must not lose an answer, and there is no other place to say it
        return


def write_event(event: str, **values: Any) -> None:
    """Writes what happened to the service itself to standard error."""
    write_line({"event": event, **values}, sys.stderr)


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error's class and where it was raised, without its message: that may repeat what a request contained."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
    }


class EventHandler(logging.Handler):
    """What uvicorn and asyncio say, as events, without the messages of exceptions."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes it."""
        error = record.exc_info[1] if record.exc_info else None
        message = record.getMessage().strip() if record.name.startswith("uvicorn") else record.name
        write_event("message", text=message, **(describe_error(error) if error else {}))


def _now() -> str:
    seconds = time.time()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
