"""SQuAD v1.1 and v2.0 and its relatives: rows of nested JSON, each with its place in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qa_onnx.data.columns import MAX_COLUMNS_SHOWN, NAMES, column_key
from qa_onnx.data.example import Example
from qa_onnx.data.json_text import json_kind, shown
from qa_onnx.data.rows import FORMATS, Row, examples_of, inside, problem_at


def parse_squad(data: Any, *, source: str) -> list[Example]:
    """Reads SQuAD data that is already in memory.

    Args:
        data: As of `json.load`.
        source: Its name in errors.

    Raises:
        InvalidInputError: The data is not in SQuAD's format; the message names the place in it.
    """
    return examples_of(rows_of_json(data), source=source, skipped=None, needs_answers=True, ids={})


def rows_of_json(data: Any, *, place: str = "", columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of JSON data: SQuAD's `data` of articles, paragraphs and questions, or any part of that.

    So a list of articles, of paragraphs with `qas` (as simpletransformers and KorQuAD 2 have them), or of flat rows
    with context, question and answers, is read too, with or without `data` around it.

    Args:
        data: As of `json.load`.
        place: Where it is in its file, such as `line 3`; empty where it is the file.
        columns: What fields are called in flat rows (see `Row`).
    """
    columns = columns or {}
    if isinstance(data, dict) and not place and "data" not in data and not _is_item(data, columns):
        names = ", ".join([shown(name) for name in data][:MAX_COLUMNS_SHOWN]) or "no fields"
        yield Row(place="", values=None, problem=problem_at("", f"a JSON object of {names}", FORMATS))
    elif isinstance(data, dict) and "data" in data:
        for row in _rows_of_array(data, place, "data"):
            yield from _rows_of_item(row, columns)
    elif isinstance(data, list):
        path = f"{place}: " if place else ""
        for index, item in enumerate(data):
            yield from _rows_of_item(Row(place=f"{path}[{index}]", values=item), columns)
    else:
        yield from _rows_of_item(Row(place=place, values=data), columns)


def _is_item(data: dict[str, Any], columns: Mapping[str, str]) -> bool:
    names = {"paragraphs", "qas", columns.get("context"), *NAMES["context"]}
    return any(name in names or column_key(name) in names for name in data)


def _rows_of_array(parent: dict[str, Any], place: str, key: str) -> Iterator[Row]:
    """The items of the array `parent[key]`; one bad row where it is none."""
    path, values = inside(place, key), parent.get(key)
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield Row(place=f"{path}[{index}]", values=value)
    else:
        given = f"a JSON {json_kind(values)}" if key in parent else "nothing"
        yield Row(place=path, values=None, problem=problem_at(path, given, "an array (as SQuAD v1.1 or v2.0 has it)"))


def _rows_of_item(item: Row, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of one article or of one paragraph with `qas`, or the flat row that it is."""
    values = item.values
    if isinstance(values, dict) and "paragraphs" in values:
        for paragraph in _rows_of_array(values, item.place, "paragraphs"):
            yield from _rows_of_paragraph(paragraph, values.get("title"))
    elif isinstance(values, dict) and "qas" in values:
        yield from _rows_of_paragraph(item, values.get("title"))
    else:
        yield replace(item, columns=columns)


def _rows_of_paragraph(paragraph: Row, title: Any) -> Iterator[Row]:
    values = paragraph.values
    context = values.get("context") if isinstance(values, dict) else None
    if not isinstance(context, str) or not context.strip():
        yield paragraph  # one bad row, not one for each question
        return
    for row in _rows_of_array(values, paragraph.place, "qas"):
        is_question = isinstance(row.values, dict)
        yield replace(row, values={**row.values, "context": context, "title": title}) if is_question else row
