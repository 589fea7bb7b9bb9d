"""Files as streams of record batches, and tables as the bytes of files: Parquet, JSON lines and CSV.

A file is never in memory as a whole. Values stay what they are: all columns of CSV are text, and a column of JSON lines
has one type in the whole file.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from qa_onnx.data.json_text import json_kind, parse_json
from qa_onnx.data.text_files import MAX_CSV_FIELD, find_separator
from qa_onnx.errors import InvalidInputError, one_line

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
"""What files with these suffixes are."""
OUTPUT_FORMATS = ("parquet", "jsonl", "csv")
BATCH_ROWS = 256
BATCH_BYTES = 8 * 2**20
"""At most so many rows or, in text files, characters are read at once."""
MAX_LINE_BYTES = 256 * 2**20
"""Of JSON lines."""
PLAIN_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_null,
)
"""Of columns whose values every format can hold."""
PARQUET_BUFFER = 2**20
"""Bytes of a column that are read at once. Unless told, pyarrow reads all that a row group has of it."""


def format_of(path: Path) -> str:
    """The format of a file, by its suffix.

    Raises:
        InvalidInputError: It is no file, or has none of the suffixes of `FORMATS`.
    """
    if not path.is_file():
        raise InvalidInputError(f"{path}: {'is no file' if path.exists() else 'there is no such file'}; expected one")
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise InvalidInputError(f"{path}: has no known suffix; expected one of {', '.join(FORMATS)}")
    return found


def read_schema(path: Path) -> pa.Schema:
    """The columns of a file and their types. JSON lines are read to their end for it.

    Raises:
        InvalidInputError: The file cannot be read.
    """
    kind = format_of(path)
    with _errors_of(path):
        if kind == "parquet":
            return pa.parquet.read_schema(path)
        if kind == "csv":
            _, header = next(_csv_rows(path))
            return pa.schema([(name, pa.string()) for name in header])
        return _json_schema(path)


def read_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of a file; what a batch has depends on the file alone.

    Args:
        path: The file.
        schema: From `read_schema`.

    Raises:
        InvalidInputError: The file cannot be read.
    """
    kind = format_of(path)
    with _errors_of(path):
        if kind == "parquet":
            with pa.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS):
                    batch.validate(full=True)  # that texts are UTF-8, too
                    yield batch
        elif kind == "csv":
            rows = _csv_rows(path)
            next(rows)
            for cells in _in_batches(rows):
                columns = zip(*(row for _, row in cells), strict=True)
                yield pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=schema)
        else:
            for objects in _in_batches(_json_rows(path)):
                arrays = [_array(field.name, objects, field.type) for field in schema]
                yield pa.record_batch(arrays, schema=schema)


def encode(table: pa.Table, output_format: str) -> bytes:
    """A table as the content of a file of one of `OUTPUT_FORMATS`.

    Raises:
        InvalidInputError: The format cannot hold a column, or one of its values.
    """
    try:
        if output_format == "jsonl":
            return "".join(_json_line(row) + "\n" for row in table.to_pylist()).encode()
        sink = pa.BufferOutputStream()
        if output_format == "csv":
            _check_dates(table)
            pa.csv.write_csv(table, sink)
        else:
            pa.parquet.write_table(table, sink, compression="zstd")
        return bytes(sink.getvalue())
    except InvalidInputError:
        raise
    except (OverflowError, ValueError, pa.ArrowException) as error:  # also of dates that Python does not have
        raise InvalidInputError(
            f"{output_format} cannot hold the values ({one_line(error)}); choose another --output-format"
        ) from error


def _check_dates(table: pa.Table) -> None:
    """Refuses dates that Arrow cannot write as text: it writes `<value out of range: ...>`, and no error.

    Raises:
        ValueError: There is one.
    """
    for column in table.columns:
        if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
            texts = column.cast(pa.string())
            if pa.compute.any(pa.compute.starts_with(texts, pattern="<value out of range")).as_py():
                raise ValueError("date value out of range")


def check_output(schema: pa.Schema, output_format: str) -> None:
    """Checks that a format can hold the columns of a file.

    Raises:
        InvalidInputError: A column has a type that the format has no form for.
    """
    for field in schema:
        is_nested = pa.types.is_nested(field.type)
        is_bytes = any(check(field.type) for check in (pa.types.is_binary, pa.types.is_large_binary))
        if (output_format == "csv" and is_nested) or (output_format != "parquet" and is_bytes):
            raise InvalidInputError(
                f"the column {field.name!r} has the type {field.type}, which {output_format} has no form for; choose "
                "another --output-format, or leave the column out"
            )


def check_values(path: Path, batch: pa.RecordBatch, output_format: str) -> None:
    """Checks that a format can hold the values of some rows, before anything is computed for them.

    Args:
        path: The file that they are from, for messages.
        batch: The rows.
        output_format: One of `OUTPUT_FORMATS`.

    Raises:
        InvalidInputError: It cannot; the message names the column.
    """
    with _errors_of(path):
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if any(is_plain(field.type) for is_plain in PLAIN_TYPES):
                continue
            try:
                encode(pa.table([column], [field.name]), output_format)
            except InvalidInputError as error:
                raise InvalidInputError(f"the column {field.name!r} of type {field.type}: {error}") from error


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into an error that names it."""
    try:
        yield
    except InvalidInputError as error:
        if str(error).startswith(str(path)):
            raise
        raise InvalidInputError(f"{path}: {error}") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}: is not UTF-8 (byte {error.object[error.start]:#x}); expected UTF-8"
        ) from error
    except (ValueError, pa.ArrowException) as error:
        raise InvalidInputError(f"{path}: cannot be read ({one_line(error)}); expected a whole file") from error


def _in_batches(rows: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Rows with their number of characters, in lists of at most `BATCH_ROWS`, and about `BATCH_BYTES`."""
    batch: list[tuple[int, Any]] = []
    total = 0
    for size, row in rows:
        batch.append((size, row))
        total += size
        if len(batch) == BATCH_ROWS or total > BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows of CSV, each with its number of characters."""
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = find_separator(file.readline())
        file.seek(0)
        reader = csv.reader(file, delimiter=separator, strict=True)
        width, line = 0, 1
        try:
            for cells in reader:
                place, line = line, reader.line_num + 1
                if len(cells) < 2 and not "".join(cells).strip():  # a blank line
                    continue
                if not width:
                    cells, width = [name.strip() for name in cells], len(cells)
                    repeated = [name for name, count in Counter(cells).items() if count > 1]
                    if repeated:
                        raise InvalidInputError(f"two columns are called {repeated[0]!r}; expected different names")
                if len(cells) != width:
                    raise InvalidInputError(
                        f"line {place}: got {len(cells)} fields; expected {width}, as the header has. Quote text that "
                        "has the separator in it"
                    )
                yield sum(map(len, cells)), cells
        except csv.Error as error:
            raise InvalidInputError(f"line {line} is not CSV ({error}); mend its quotes") from error
    if not width:
        raise InvalidInputError("the file is empty; expected a header with question and context")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, each with its number of bytes."""
    with path.open("rb") as file:
        for number, data in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b""), 1):
            if len(data) == MAX_LINE_BYTES:
                raise InvalidInputError(f"line {number} is longer than {MAX_LINE_BYTES:,} bytes; expected JSON lines")
            line = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not line:
                continue
            value = parse_json(line, first_line=number)
            if not isinstance(value, dict):
                raise InvalidInputError(f"line {number}: got a JSON {json_kind(value)}; expected an object")
            yield len(data), value


def _json_schema(path: Path) -> pa.Schema:
    """The type of each column of JSON lines, which may be missing in some of them."""
    types: dict[str, pa.DataType] = {}
    for objects in _in_batches(_json_rows(path)):
        for name in dict.fromkeys(name for _, row in objects for name in row):
            found = _array(name, objects).type
            fields = [pa.schema([(name, kind)]) for kind in (types.get(name, found), found)]
            try:
                types[name] = pa.unify_schemas(fields, promote_options="permissive").field(0).type
            except pa.ArrowException as error:
                raise InvalidInputError(_mixed(name, error)) from error
    # A column without a value has no type of its own, which some readers of Parquet do not know.
    return pa.schema([(name, pa.string() if kind == pa.null() else kind) for name, kind in types.items()])


def _array(name: str, objects: list[tuple[int, dict[str, Any]]], kind: pa.DataType | None = None) -> pa.Array:
    """A column of some objects."""
    try:
        return pa.array([row.get(name) for _, row in objects], kind)
    except (pa.ArrowException, OverflowError) as error:
        raise InvalidInputError(_mixed(name, error)) from error
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the column {name!r} has a lone surrogate; expected text in UTF-8") from error


def _mixed(name: str, error: BaseException) -> str:
    return f"the column {name!r} has values of different types ({one_line(error)}); expected one type"


def _json_line(row: dict[str, Any]) -> str:
    write: Callable[[Any], str] = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=_json_text)
    try:
        return write(row)
    except ValueError:  # JSON has no infinity, and nothing that is no number
        return write(_finite(row))


def _json_text(value: object) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise InvalidInputError(
        f"got a value of type {type(value).__name__}, which jsonl has no form for; choose another --output-format"
    )


def _finite(value: Any) -> Any:
    """A value with null in place of numbers that JSON does not have, as pandas writes them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
