"""JSON files, with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qa_onnx.errors import InvalidInputError
from qa_onnx.files import read_text

MAX_SHOWN = 60
"""Characters of a value that messages show."""


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        InvalidInputError: The file cannot be read or is not JSON; the message names the line.
    """
    try:
        return parse_json(read_text(path, expected="a JSON file"))
    except ValueError as error:
        raise error if isinstance(error, InvalidInputError) else InvalidInputError(f"{path}: {error}") from error


def parse_json(text: str, *, first_line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        text: All of it.
        first_line: The number of its first line in the file, for messages.

    Raises:
        ValueError: The text is not JSON; the message says where.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"not valid JSON that can be read (line {first_line} on: nested too deep)") from error
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"not valid JSON at {place} ({error.msg}); is the file whole?") from error
    except ValueError as error:  # such as a number of thousands of digits
        raise ValueError(f"not valid JSON that can be read (line {first_line} on: {error})") from error


def json_kind(value: object) -> str:
    """What JSON calls a value of this type: object, array, string, boolean, null or number."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def shown(value: object) -> str:
    """A value of a file as messages show it."""
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    if isinstance(value, dict | list | bool | None):
        return f"a JSON {json_kind(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
