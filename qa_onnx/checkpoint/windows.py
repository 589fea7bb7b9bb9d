"""`windows.json`: how a model was trained to read long contexts, written by training and taken over by the export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from qa_onnx.checkpoint.files import read_json
from qa_onnx.errors import InvalidInputError, short_repr
from qa_onnx.files import write_file
from qa_onnx.text.windows import WindowSettings

WINDOWS_NAME = "windows.json"


def read_windows(directory: Path) -> WindowSettings:
    """The window settings of a model's directory; the defaults where it has none.

    Raises:
        InvalidInputError: The file is not what `write_windows` writes.
    """
    values = read_json(directory, WINDOWS_NAME)
    if values is None:
        return WindowSettings()
    if values.keys() != {"window", "stride"}:
        raise InvalidInputError(
            f"{WINDOWS_NAME} has {', '.join(sorted(map(short_repr, values))) or 'nothing'}; expected window and stride "
            "alone. Delete it, or train the model again"
        )
    try:
        return WindowSettings(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{WINDOWS_NAME}: {error}") from error


def write_windows(directory: Path, settings: WindowSettings) -> None:
    """Writes the window settings of a model into its directory."""
    write_file(directory / WINDOWS_NAME, json.dumps(asdict(settings), indent=2) + "\n")
