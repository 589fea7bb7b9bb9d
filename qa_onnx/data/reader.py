"""The one reader of questions: whatever the format, the same examples and the same errors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from qa_onnx.data.example import Example
from qa_onnx.data.rows import FORMATS, Row, examples_of
from qa_onnx.data.tables import HUB_DATASETS, is_hub_id, rows_of_directory, rows_of_hub, rows_of_parquet
from qa_onnx.data.text_files import is_csv, is_json, rows_of_csv, rows_of_json_text
from qa_onnx.errors import InvalidInputError
from qa_onnx.files import read_text

Split = Literal["train", "validation"]
JSON_LINES, CSV = (".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = {".json": "a JSON file", ".parquet": "a Parquet file"}
SUFFIXES |= dict.fromkeys(JSON_LINES, "a JSON lines file") | dict.fromkeys(CSV, "a CSV file")
"""What a file of each name should be, for messages."""


def read_examples(
    name: str | Path,
    *,
    split: Split = "validation",
    columns: Mapping[str, str] | None = None,
    skipped: list[str] | None = None,
    needs_answers: bool = True,
    unique_ids: bool = True,
) -> list[Example]:
    """Reads questions with their passages and gold answers.

    Every format has the same fields: context, question and answers, and maybe answer_start, is_impossible, id and
    title (`qa_onnx.data.columns` lists their other names). Answers are a text, a list of texts, objects with `text`
    and `answer_start`, or SQuAD's `{"text": [...], "answer_start": [...]}`; null or nothing in it is no answer, as is
    `is_impossible`. A cell of a CSV file may write these out, as pandas does, and `nan`, `None` or `null` is no answer
    there; but a cell that its passage contains as it is, is an answer. A question without an id gets its place.

    Args:
        name: A file of SQuAD JSON (v1.1, v2.0 and its relatives), JSON lines, CSV, TSV or Parquet; a folder that
            `save_to_disk` of datasets wrote; `squad`, `squad_v2` or `owner/name` of the hub. The content decides where
            the name does not.
        split: Of a data set of the hub, or of a folder that has splits.
        columns: What fields are called in flat rows, where not by their usual names.
        skipped: Takes what is wrong with each bad row, which is left out then. Without it the first one is an error.
        needs_answers: False leaves gold answers aside: they may be missing, and the examples have none.
        unique_ids: Whether two questions may not have one id.

    Raises:
        InvalidInputError: The data cannot be read, a row is bad, or no row can be used. The message names the place.
    """
    ids: dict[str, tuple[str, str]] | None = {} if unique_ids else None
    return _read(str(name), split, columns, skipped, needs_answers=needs_answers, ids=ids)


def read_sources(
    names: Sequence[str | Path],
    *,
    split: Split = "validation",
    columns: Mapping[str, str] | None = None,
    skipped: list[str] | None = None,
    needs_answers: bool = True,
) -> list[Example]:
    """Reads the questions of several sources, one after the other, whose ids must be unique across all of them.

    A question without an id gets its place, which names the file where there are several: `rows.csv: line 7`.

    Args:
        names: As `name` of `read_examples`, each of them another source.
        split: See `read_examples`.
        columns: See `read_examples`; the same for all sources.
        skipped: See `read_examples`.
        needs_answers: See `read_examples`.

    Raises:
        InvalidInputError: As `read_examples` does, or no source or one of them twice is given.
    """
    if not names:
        raise InvalidInputError("got no source of questions; expected at least one")
    sources = [str(name) for name in names]
    places = Counter(os.path.realpath(source) for source in sources)
    for source in sources:
        if places[os.path.realpath(source)] > 1:
            raise InvalidInputError(f"got {source} twice; expected different sources")
    short = Counter(Path(source).name for source in sources)
    ids: dict[str, tuple[str, str]] = {}
    examples: list[Example] = []
    for source in sources:
        label = "" if len(sources) == 1 else source if short[Path(source).name] > 1 else Path(source).name
        examples += _read(source, split, columns, skipped, needs_answers=needs_answers, ids=ids, label=label)
    return examples


def _read(
    name: str,
    split: Split,
    columns: Mapping[str, str] | None,
    skipped: list[str] | None,
    *,
    needs_answers: bool,
    ids: dict[str, tuple[str, str]] | None,
    label: str = "",
) -> list[Example]:
    try:
        rows = _rows(name, split, columns or {})
        return examples_of(rows, source=name, skipped=skipped, needs_answers=needs_answers, ids=ids, label=label)
    except InvalidInputError:
        raise
    except ValueError as error:
        raise InvalidInputError(f"{name}: {error}") from error
    except OSError as error:  # such as a directory of another user
        raise InvalidInputError(f"{name}: cannot be read ({error.strerror}); expected {FORMATS}") from error


def _rows(name: str, split: Split, columns: Mapping[str, str]) -> Iterator[Row]:
    path, suffix = Path(name), Path(name).suffix.lower()
    if name in HUB_DATASETS or (suffix not in SUFFIXES and not path.exists() and is_hub_id(name)):
        return rows_of_hub(name, split=split, columns=columns)
    if path.is_dir():
        return rows_of_directory(path, split=split, columns=columns)
    if suffix == ".parquet" and path.exists():
        return rows_of_parquet(path, columns=columns)
    text = read_text(path, expected=SUFFIXES.get(suffix, FORMATS))
    if suffix in CSV or (suffix not in SUFFIXES and not is_json(text) and is_csv(text, columns)):
        return rows_of_csv(text, columns=columns)
    if suffix in (".json", *JSON_LINES) or is_json(text):
        return rows_of_json_text(text, is_lines=suffix in JSON_LINES, columns=columns)
    raise InvalidInputError(f"{name}: got a text of no known format; expected {FORMATS}")
