"""Data files in each format, good ones and bad, drawn at random."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from random import Random
from typing import Any

from bench.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, dump_json, mutate_json

WRITTEN_OUT = ("nan", "NaN", "None", "null", "[]", "{}", "['a']", '["a"]', "{'text': [], 'answer_start': []}")
"""What writers of CSV make of values that are no text: never an answer."""


def _squad(random: Random, squad: Any, rows: list[dict[str, Any]]) -> tuple[bytes, str]:
    done = [mutate_json(random, squad) for _ in range(random.choice((0, 1, 1, 3)))]
    return dump_json(random, squad), ", ".join(done)


def _jsonl(random: Random, squad: Any, rows: list[dict[str, Any]]) -> tuple[bytes, str]:
    values: list[Any] = rows
    done = [mutate_json(random, values) for _ in range(random.choice((0, 1, 1, 3)))]
    line_end = random.choice((b"\n", b"\n", b"\r\n", b"\n\n"))
    return line_end.join(dump_json(random, row) for row in values), ", ".join(done)


def _csv(random: Random, squad: Any, rows: list[dict[str, Any]], delimiter: str = ",") -> tuple[bytes, str]:
    done = ""
    if random.random() < 0.7:
        row, name = random.choice(rows), random.choice(list(rows[0]))
        row[name] = random.choice((*WRITTEN_OUT, *ODD_TEXTS[:-1], *ODD_NUMBERS, "a\nb", 'a"b', "a,b", "a;b", "a\tb"))
        done = f"{name} is {repr(row[name])[:60]}"
    if random.random() < 0.2:
        name = random.choice(list(rows[0]))
        rows = [{("answer" if key == name else key): value for key, value in row.items()} for row in rows]
        done += f", {name} renamed"
    file = io.StringIO(newline="")
    quoting = random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    encoding = random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"))
    return file.getvalue().encode(encoding, "surrogatepass"), done


def _tsv(random: Random, squad: Any, rows: list[dict[str, Any]]) -> tuple[bytes, str]:
    return _csv(random, squad, rows, "\t")


def _parquet(random: Random, squad: Any, rows: list[dict[str, Any]]) -> tuple[bytes, str]:
    import pyarrow
    from pyarrow import parquet

    name = random.choice(list(rows[0]))
    values = [random.choice((None, [], row[name], [row[name]])) if random.random() < 0.3 else row[name] for row in rows]
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    buffer = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(columns | {name: values}), buffer)
    except pyarrow.ArrowException:  # values of several types
        parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue(), f"{name} is {repr(values)[:200]}"


WRITERS: dict[str, Callable[[Random, Any, list[dict[str, Any]]], tuple[bytes, str]]] = {
    ".json": _squad,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
"""By suffix: makes a file of SQuAD data, or of the same questions in rows; returns its content and what was done."""
