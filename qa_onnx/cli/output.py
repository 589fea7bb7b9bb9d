"""What commands print: lines and JSON on standard output."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qa_onnx.answer import Answer
from qa_onnx.data.example import Example


def write_line(line: str) -> None:
    """Prints a line."""
    sys.stdout.write(line + "\n")


def write_json(value: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Prints JSON, in ASCII where standard output is not UTF-8."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    write_line(json.dumps(value, ensure_ascii=not is_utf8, indent=indent))


def on_one_line(text: str) -> str:
    """A text with each run of white space replaced by a space."""
    return " ".join(text.split())


def answer_to_json(example: Example, answer: Answer) -> str:
    """An answer and the id of its question as a JSON object on one line."""
    return json.dumps({"id": example.id} | answer.to_dict(), ensure_ascii=False)


def to_json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Objects as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
