"""What a run has to do: its input files, checked from their first row to the last, and their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from qa_onnx.batch import text_problem
from qa_onnx.bulk.table_files import FORMATS, check_output, check_values, format_of, read_batches, read_schema
from qa_onnx.data.columns import REQUIRED, find_columns
from qa_onnx.errors import InvalidInputError
from qa_onnx.manifest import sha256_of

MAX_SHARD_BYTES = 64 * 2**20
"""A shard has at most this or one batch of rows (`qa_onnx.bulk.table_files`), however many rows it may have."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file to answer.

    Attributes:
        path: Where it is.
        schema: Its columns.
        question: Name of the column with the questions.
        context: Name of the column with the contexts.
        sha256: Of its content.
        shards: Number of rows of each of its shards, which are as its rows are, one after another.
    """

    path: Path
    schema: pa.Schema
    question: str
    context: str
    sha256: str
    shards: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """What identifies the file in the manifest of a run, wherever the file is."""
        return {
            "name": self.path.name,
            "sha256": self.sha256,
            "question": self.question,
            "context": self.context,
            "shards": list(self.shards),
        }

    def tables(self, wanted: Sequence[bool]) -> Iterator[pa.Table | None]:
        """The rows of each shard; None for those that are not wanted.

        Raises:
            InvalidInputError: The file cannot be read, or is not as it was.
        """
        if not any(wanted):
            yield from [None] * len(wanted)
            return
        batches = read_batches(self.path, self.schema)
        parts: list[pa.RecordBatch] = []
        rows = 0
        for size, is_wanted in zip(self.shards, wanted, strict=True):
            while rows < size:
                batch = next(batches, None)
                if batch is None:
                    raise InvalidInputError(f"{self.path}: has fewer rows than before; expected it unchanged in a run")
                parts.append(batch)
                rows += batch.num_rows
            left = rows - size
            parts, last = [*parts[:-1], parts[-1].slice(0, parts[-1].num_rows - left)], parts[-1]
            yield pa.Table.from_batches(parts, self.schema) if is_wanted else None
            parts, rows = ([last.slice(last.num_rows - left)], left) if left else ([], 0)


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that are given, and those in folders that are given, in the order of their names.

    Names that begin with `.` or `_` are left out, as Spark and Hive do, and in folders all without a known suffix.

    Raises:
        InvalidInputError: One is not there, or has no known suffix, a folder has no files, or two files are the same.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                file
                for file in path.iterdir()
                if file.is_file() and file.suffix.lower() in FORMATS and not file.name.startswith((".", "_"))
            )
            if not found:
                raise InvalidInputError(f"{path}: has no files to answer; expected some of {', '.join(FORMATS)}")
            files += found
        else:
            format_of(path)
            files.append(path)
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise InvalidInputError(f"--input has {path} twice; expected each file once")
        seen.add(path.resolve())
    return files


def plan_file(
    path: Path,
    *,
    columns: Mapping[str, str],
    results: Sequence[str],
    needs_texts: bool,
    output_format: str,
    shard_rows: int,
) -> InputFile:
    """Reads a file to its end, checks it, and divides it into shards.

    Args:
        path: The file.
        columns: What its fields are called, from `qa_onnx.data.columns.parse_columns`.
        results: Names of the columns that are added.
        needs_texts: Whether each row has to have a question and a context.
        output_format: One of `OUTPUT_FORMATS`.
        shard_rows: Maximum number of rows of a shard.

    Raises:
        InvalidInputError: The file cannot be read, a column is missing or of the wrong type, a name of a result is
            taken, the output format cannot hold a column or a value, or a row has no text.
    """
    schema = read_schema(path)
    try:
        found = _find_columns(schema, columns, results)
        check_output(schema, output_format)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error

    def check(batch: pa.RecordBatch, row: int) -> None:
        check_values(path, batch, output_format)
        if needs_texts:
            _check_texts(path, batch, found, row)

    return InputFile(
        path=path,
        schema=schema,
        question=found["question"],
        context=found["context"],
        sha256=sha256_of(path),
        shards=_split_into_shards(read_batches(path, schema), check, shard_rows),
    )


def _find_columns(schema: pa.Schema, columns: Mapping[str, str], results: Sequence[str]) -> dict[str, str]:
    """The columns of question and context, by field; those of results must be free."""
    if len(set(schema.names)) < len(schema.names):
        raise InvalidInputError(f"two of the columns {', '.join(map(repr, schema.names))} have one name")
    found = find_columns(schema.names, columns=columns, required=REQUIRED, fields=REQUIRED)
    taken = [name for name in results if name in schema.names]
    if taken:
        raise InvalidInputError(
            f"has a column {' and '.join(map(repr, taken))} already, where an answer would go; expected another "
            "name. Pass --prefix, such as --prefix qa_"
        )
    for name in found.values():
        _check_type(name, schema.field(name).type)
    return found


def _split_into_shards(
    batches: Iterable[pa.RecordBatch], check: Callable[[pa.RecordBatch, int], None], shard_rows: int
) -> tuple[int, ...]:
    """Numbers of rows of the shards: at most `shard_rows`, or about `MAX_SHARD_BYTES`.

    Args:
        batches: All rows.
        check: Called with each batch, and the number of rows before it.
        shard_rows: Maximum number of rows of a shard.
    """
    shards: list[int] = []
    row, size, total = 0, 0, 0
    for batch in batches:
        check(batch, row)
        row += batch.num_rows
        left = batch.num_rows
        while size + left >= shard_rows:
            shards.append(shard_rows)
            left -= shard_rows - size
            size, total = 0, 0
        size += left
        total += batch.nbytes
        if size and total > MAX_SHARD_BYTES:
            shards.append(size)
            size, total = 0, 0
    return (*shards, size) if size else tuple(shards)


def _check_type(name: str, kind: pa.DataType) -> None:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(check(value) for check in is_text):
        raise InvalidInputError(f"the column {name!r} has the type {kind}; expected text")


def _check_texts(path: Path, batch: pa.RecordBatch, columns: Mapping[str, str], first: int) -> None:
    for field in ("question", "context"):
        for index, value in enumerate(batch.column(columns[field]).to_pylist()):
            problem = text_problem(columns[field], value)
            if problem:
                raise InvalidInputError(
                    f"{path}: row {first + index} (the first is 0): {problem}. Mend it, or pass --on-error null, which "
                    "answers the others"
                )
