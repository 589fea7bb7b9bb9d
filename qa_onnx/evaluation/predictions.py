"""Reading what `python -m qa_onnx predict` writes: predictions, and whole answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from qa_onnx.data.json_text import json_kind, parse_json, read_json
from qa_onnx.errors import InvalidInputError
from qa_onnx.files import read_text


def read_predictions(path: str | Path) -> dict[str, str]:
    """Reads a predictions file: one JSON object of question id to answer text.

    Raises:
        InvalidInputError: The file cannot be read or is not such an object.
    """
    predictions = read_json(path)
    if not isinstance(predictions, dict):
        kind = json_kind(predictions)
        raise InvalidInputError(f"{path}: got a JSON {kind}; expected an object of question id to answer")
    for key, value in predictions.items():
        if not isinstance(value, str):
            raise InvalidInputError(f"{path}: the answer of {key!r} is a JSON {json_kind(value)}; expected a string")
    return predictions


def read_answers(path: str | Path) -> dict[str, dict[str, Any]]:
    """Reads what `predict --answers` writes: a JSON object a line, `id`, `text` and the rest of `Answer` in each.

    Raises:
        InvalidInputError: The file cannot be read, or a line is not such an object; the message names the line.
    """
    answers = {}
    for number, line in enumerate(io.StringIO(read_text(path, expected="a JSON lines file")), 1):  # only \n ends a line
        try:
            answer = parse_json(line, first_line=number)
        except ValueError as error:
            raise InvalidInputError(f"{path}: {error}") from error
        if not isinstance(answer, dict):
            raise InvalidInputError(f"{path}: line {number} is a JSON {json_kind(answer)}; expected an object")
        kinds = {"id": str, "text": str, "score": float, "no_answer_probability": float, "windows": int}
        for name, kind in kinds.items():
            if type(answer.get(name)) is not kind:
                raise InvalidInputError(
                    f"{path}: line {number}: {name} is {answer.get(name)!r}; expected the answers that "
                    "`python -m qa_onnx predict --answers FILE` writes"
                )
        answers[answer["id"]] = answer
    return answers
