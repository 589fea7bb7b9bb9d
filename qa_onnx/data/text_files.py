"""Rows of text files: JSON, JSON lines, and CSV with any usual separator."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from qa_onnx.data.columns import NAMES, REQUIRED, column_key
from qa_onnx.data.json_text import parse_json, shown
from qa_onnx.data.rows import Row, problem_at
from qa_onnx.data.squad import rows_of_json

MAX_CSV_FIELD = 2**31 - 1
"""Characters; Python's own limit of 131,072 is less than some documents have."""
SEPARATORS = ",;\t|"


def is_json(text: str) -> bool:
    """Whether a text begins as a JSON object or array does."""
    return text.lstrip()[:1] in ("{", "[")


def is_csv(text: str, columns: Mapping[str, str]) -> bool:
    """Whether the first line of a text names a question and its passage."""
    header = {column_key(name.strip(' "')) for name in _first_line(text).split(find_separator(text))}
    expected = {field: (columns[field],) if field in columns else NAMES[field] for field in REQUIRED}
    return all(not header.isdisjoint(map(column_key, names)) for names in expected.values())


def rows_of_json_text(text: str, *, is_lines: bool, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of JSON, or of JSON lines where the first line is a JSON value of its own.

    Args:
        text: All of the file.
        is_lines: Whether its name says that it is JSON lines. Then a line that is not JSON is a bad row.
        columns: See `Row`.

    Raises:
        ValueError: The text is no JSON.
    """
    first, _, rest = text.strip().partition("\n")
    has_lines = bool(rest) and _is_valid(first)
    if has_lines or (is_lines and not (rest and _is_valid(text))):
        return _rows_of_lines(text, columns)
    return rows_of_json(parse_json(text), columns=columns)


def _is_valid(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _rows_of_lines(text: str, columns: Mapping[str, str]) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text), 1):  # only \n ends a line
        place = f"line {number}"
        if line.strip():
            try:
                value = parse_json(line, first_line=number)
            except ValueError as error:
                yield Row(place=place, values=None, problem=str(error))
                continue
            yield from rows_of_json(value, place=place, columns=columns)


def rows_of_csv(text: str, *, columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows of CSV with a header; the separator is found there.

    Raises:
        ValueError: The text is not CSV; the message says where.
    """
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=find_separator(text), strict=True)
    header: list[str] | None = None
    has_rows = False
    line = 1
    try:
        for cells in reader:
            place, line = f"line {line}", reader.line_num + 1
            if len(cells) < 2 and not "".join(cells).strip():  # a blank line
                continue
            if header is None:
                header = [name.strip() for name in cells]
                repeated = [name for name, count in Counter(filter(None, header)).items() if count > 1]
                if repeated:
                    raise ValueError(f"{place}: two columns are called {shown(repeated[0])}; expected different names")
                continue
            has_rows = True
            if len(cells) != len(header):
                given = f"{len(cells)} fields"
                expected = f"{len(header)}, as the header has. Quote text that has the separator in it"
                yield Row(place=place, values=None, problem=problem_at(place, given, expected))
            else:
                yield Row(place=place, values=dict(zip(header, cells, strict=True)), columns=columns, is_text=True)
    except csv.Error as error:
        raise ValueError(f"line {line} is not CSV ({error}); mend its quotes") from error
    if header is None:
        raise ValueError("the file is empty: there are no questions; expected a header with context, question, answers")
    if not has_rows:
        raise ValueError("there are no questions below the header; expected at least one row")


def find_separator(text: str) -> str:
    """The separator of CSV: whichever of `SEPARATORS` the first line of a text has most often outside of quotes."""
    header = re.sub(r'"[^"]*"', "", _first_line(text))
    return max(SEPARATORS, key=header.count)


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
