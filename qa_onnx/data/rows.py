"""One question as a file has it, a row, and the example that is made of it: the same for every format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from qa_onnx.data.columns import FIELDS, GOLD_FIELDS, REQUIRED, find_columns, missing_column
from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.json_text import json_kind, shown
from qa_onnx.data.literal import parse_literal
from qa_onnx.errors import InvalidInputError

MISSING_WORDS = frozenset(("nan", "np.nan", "nat", "none", "null", "nil", "<na>", "na", "n/a", "#n/a"))
"""What Python, pandas, R and spreadsheets write, in any case, where there is no value."""
FORMATS = (
    "SQuAD JSON, JSON lines, CSV or TSV (.json, .jsonl, .csv, .tsv), a .parquet file, a folder that `save_to_disk` of "
    "datasets wrote, or an id of the hub"
)
"""What is read, for messages."""
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LITERAL = re.compile(
    r"""
    \[.*\] | \{.*\}                       # a list, a dict or a set
  | \((?:['"(\[{].*)?\)                  # a tuple
  | [bBuUrR]{0,2}(?:'[^']*'|"[^"]*")       # a quoted text
  | (?:array|set|frozenset|tuple|list|dict|OrderedDict|defaultdict|Series|Index|DataFrame
      |(?:np|numpy|pd|pandas|collections)\.\w+)\(.*\)
    """,
    re.VERBOSE | re.DOTALL,
)
"""A value of Python, NumPy, pandas or JSON that is written out."""
LITERAL_BEGINNINGS = ("[", "{", "('", '("', "array(")
"""Of such a value, though its end is missing."""
MAX_ROWS_NAMED = 5
"""Skipped rows that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A question as a file has it.

    Attributes:
        place: Where in the file, such as `line 3` or `data[0].paragraphs[3].qas[1]`.
        values: By column; whatever else stands there makes the row bad.
        columns: What fields are called in this row, where not by one of `NAMES`; None where they cannot have others.
        is_text: Whether the values are the cells of a CSV file, which have no types.
        problem: What is wrong with it, where that is known already.
    """

    place: str
    values: Any
    columns: Mapping[str, str] | None = None
    is_text: bool = False
    problem: str = ""


def examples_of(
    rows: Iterable[Row],
    *,
    source: str,
    skipped: list[str] | None,
    needs_answers: bool,
    ids: dict[str, tuple[str, str]] | None,
    label: str = "",
) -> list[Example]:
    """Makes the examples of rows.

    Args:
        rows: From one source.
        source: Its name in errors.
        skipped: Takes what is wrong with each bad row, which is left out then. Without it the first one is an error.
        needs_answers: False leaves gold answers aside, whatever they are: the examples have none.
        ids: Takes the source and the place of each id; an id that is in it already makes a row bad. None allows
            several questions of one id.
        label: Begins the place that replaces a missing id.

    Raises:
        InvalidInputError: A bad row, or no row that can be used.
    """
    examples: list[Example] = []
    bad_rows: list[str] = []
    for row in rows:
        try:
            example = _example(row, needs_answers=needs_answers, source=source, label=label)
            if ids is not None and example.id in ids:
                other = ": ".join(part for part in ids[example.id] if part != source)
                fail(inside(row.place, "id"), shown(example.id), f"an id of its own ({other} has it too)")
        except InvalidInputError as error:
            if skipped is None:
                raise InvalidInputError(f"{source}: {error}") from error
            bad_rows.append(str(error))
            continue
        if ids is not None:
            ids[example.id] = (source, row.place)
        examples.append(example)
    if not examples and bad_rows:
        which = f"all {len(bad_rows):,} rows are bad, the first" if len(bad_rows) > 1 else "its only row is bad"
        raise InvalidInputError(f"{source}: {which}: {bad_rows[0]}")
    if not examples:
        raise InvalidInputError(f"{source}: there are no questions; expected at least one")
    if skipped is not None:
        skipped += [f"{source}: {problem}" for problem in bad_rows]
    return examples


def check_skipped(skipped: Collection[str], good: int) -> None:
    """Refuses bad rows that were not to be skipped.

    Args:
        skipped: What is wrong with each bad row, from `qa_onnx.data.reader.read_sources`.
        good: How many rows are not bad.

    Raises:
        InvalidInputError: There are bad rows.
    """
    for first in skipped:
        others = f" ({len(skipped):,} of {len(skipped) + good:,} rows are bad)" if len(skipped) > 1 else ""
        raise InvalidInputError(f"{first}{others}. Mend it, or leave such rows out with --skip-bad-rows")


def skipped_lines(skipped: Collection[str]) -> list[str]:
    """What a user has to know of rows that were skipped: the first ones, and how many more there are."""
    more = len(skipped) - MAX_ROWS_NAMED
    lines = [f"skipped: {problem}" for problem in [*skipped][:MAX_ROWS_NAMED]]
    return lines + ([f"skipped: {more:,} more bad rows"] if more > 0 else [])


def fail(place: str, given: str, expected: str) -> NoReturn:
    """Raises what is wrong with one place of a file."""
    raise InvalidInputError(problem_at(place, given, expected))


def problem_at(place: str, given: str, expected: str) -> str:
    """What is wrong with one place of a file, as a message."""
    return f"{place or 'the top level'}: got {given}; expected {expected}"


def inside(place: str, name: str) -> str:
    """The place of a field: `line 3: question`, `data[0].title`."""
    return f"{place}.{name}" if place.endswith("]") else f"{place}: {name}" if place else name


def _example(row: Row, *, needs_answers: bool, source: str, label: str) -> Example:
    names = _names(row, needs_answers=needs_answers)
    values = {name: row.values.get(column) for name, column in names.items()}
    for field, value in values.items():
        is_missing_word = row.is_text and field != "answers" and str(value).strip().lower() in MISSING_WORDS
        if is_missing_word or (isinstance(value, float) and value != value):
            values[field] = None
    texts = {}
    for name in REQUIRED:
        _check_column(row, name, names, needs_answers=needs_answers)
        texts[name] = _text(values[name], inside(row.place, names[name]))
    own_place = ": ".join(filter(None, (label, row.place)))
    return Example(
        id=_name(values["id"], inside(row.place, names["id"])) or own_place or "question",
        title=_name(values["title"], inside(row.place, names["title"])),
        context=texts["context"],
        question=texts["question"],
        answers=_answers(row, names, values, texts["context"]) if needs_answers else (),
        place=": ".join(filter(None, (source, row.place))),
    )


def _names(row: Row, *, needs_answers: bool) -> Mapping[str, str]:
    """What each field is called in a row; a field that it lacks has its own name."""
    if row.problem:
        raise InvalidInputError(row.problem)
    if not isinstance(row.values, dict):
        fail(row.place, f"a JSON {json_kind(row.values)}", "an object with context, question and answers")
    columns = None if row.columns is None else tuple(row.columns.items())
    try:
        names = _names_in(tuple(row.values), columns, needs_answers)
    except InvalidInputError as error:
        raise InvalidInputError(f"{row.place or 'the top level'}: {error}") from error
    for field in row.columns or {}:
        _check_column(row, field, names, needs_answers=needs_answers)
    return names


@lru_cache(maxsize=64)  # the rows of a file mostly have the same columns
def _names_in(
    header: tuple[str, ...], columns: tuple[tuple[str, str], ...] | None, needs_answers: bool
) -> Mapping[str, str]:
    given = None if columns is None else dict(columns)
    fields = [field for field in FIELDS if needs_answers or field not in GOLD_FIELDS or field in (given or {})]
    found = find_columns(header, columns=given, fields=fields)
    return MappingProxyType({field: found.get(field, field) for field in FIELDS})


def _check_column(row: Row, name: str, names: Mapping[str, str], *, needs_answers: bool) -> None:
    if names[name] in row.values:
        return
    if row.columns is None:
        fail(inside(row.place, name), "nothing", "answers" if name == "answers" else "some text")
    required = (*REQUIRED, "answers") if needs_answers else REQUIRED
    problem = missing_column(name, row.values, columns=row.columns, found=names, required=required)
    raise InvalidInputError(f"{row.place or 'the top level'}: {problem}")


def _answers(row: Row, names: Mapping[str, str], values: Mapping[str, Any], context: str) -> tuple[GoldAnswer, ...]:
    if _flag(values["is_impossible"], inside(row.place, names["is_impossible"])):
        return ()
    _check_column(row, "answers", names, needs_answers=True)
    place, start_place = inside(row.place, names["answers"]), inside(row.place, names["answer_start"])
    value, start = values["answers"], values["answer_start"]
    value = _written_out(value, context, place, is_text=row.is_text)
    start = _written_out(start, "", start_place, is_text=row.is_text)
    if isinstance(value, dict) and "text" in value:
        place, start_place = f"{place}.text", f"{place}.answer_start"
        value, start = value["text"], value.get("answer_start")
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        start = start[0] if isinstance(start, list) and len(start) == 1 else start
        return (_gold_answer(context, value, start, place, start_place),)
    if not isinstance(value, list):
        fail(place, shown(value), "a text, texts, or objects with text and answer_start")
    starts: list[Any] = [None] * len(value) if start is None else start if isinstance(start, list) else [start]
    if len(starts) != len(value):
        fail(start_place, f"{len(starts)} of {len(value)} answers", "one for each answer")
    answers = []
    for index, (item, item_start) in enumerate(zip(value, starts, strict=True)):
        here, here_start = f"{place}[{index}]", f"{start_place}[{index}]"
        text = item
        if isinstance(item, dict):
            text, item_start = item.get("text"), item.get("answer_start")
            here, here_start = f"{here}.text", f"{here}.answer_start"
        written = _written_out(text, context, here, is_text=row.is_text)
        if isinstance(written, list | dict):
            written = text
        if written is not None or text is None:  # a missing word is none of the answers, nothing at all a bad row
            answers.append(_gold_answer(context, written, item_start, here, here_start))
    return tuple(answers)


def _gold_answer(context: str, value: object, start: object, place: str, start_place: str) -> GoldAnswer:
    text, number = _text(value, place), _start(start, start_place)
    if number is None:
        whole_words = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
        number = whole_words.start() if whole_words else max(context.find(text), 0)
    return GoldAnswer(text=text, start=number)


def _written_out(value: Any, context: str, place: str, *, is_text: bool) -> Any:
    """A value, or what a text writes out: a list, a dict or a quoted text; None for a word that says there is nothing.

    What the passage contains as it is, such as the answer `[1]` or `None`, stays text; so does, where texts have a
    type of their own, what writes out no answers. In a cell of CSV that is an error.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in MISSING_WORDS:
        return value if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context) else None
    if (not text.startswith(LITERAL_BEGINNINGS) and LITERAL.fullmatch(text) is None) or text in context:
        return value
    try:
        written = parse_literal(text)
    except ValueError as error:
        if not is_text:
            return value
        fail(place, shown(value), f"a text of the passage, or a whole list or dict ({error})")
    if not written or written == [None]:
        return None
    return written if is_text or _is_answers(written) else value


def _is_answers(value: Any) -> bool:
    """Whether a value that a text wrote out is a text, texts, or objects with texts."""
    items = value if isinstance(value, list) else [value]
    is_texts = all(isinstance(item, str) for item in items)
    return is_texts or all(isinstance(item, dict) and "text" in item for item in items)


def _flag(value: object, place: str) -> bool:
    if value is None or value == "":
        return False
    flag = FLAGS.get(str(value).lower())
    if flag is None or not isinstance(value, bool | int | float | str):
        fail(place, shown(value), "true or false")
    return flag


def _start(value: object, place: str) -> int | None:
    if value is None or value == "" or value != value:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = value if isinstance(value, int) else float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    except (ValueError, OverflowError):
        fail(place, shown(value), "a whole number")


def _text(value: object, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        fail(place, shown(value), "some text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        fail(place, "a lone surrogate", "text that can be written as UTF-8")
    return value


def _name(value: object, place: str) -> str:
    """An id or a title: a string or a number; empty where there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return "" if value is None or value == "" else _text(value, place)
