"""One question as a file has it, a row, and the example that is made of it: the same for every format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from qa_onnx.data.example import Example, GoldAnswer
from qa_onnx.data.json_text import json_kind
from qa_onnx.data.literal import parse_literal
from qa_onnx.errors import InvalidInputError

NAMES: dict[str, tuple[str, ...]] = {
    "context": ("context", "passage", "text"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "reply"),
    "answer_start": ("answer_start",),
    "is_impossible": ("is_impossible",),
    "id": ("id",),
    "title": ("title",),
}
"""What the fields of a row may be called, in any case; the first name that a row has is taken."""
FIELDS = tuple(NAMES)
MISSING_WORDS = frozenset(("nan", "NaN", "NAN", "NaT", "None", "null", "NULL", "<NA>", "NA", "N/A", "n/a", "#N/A"))
"""What pandas, R and spreadsheets write into a CSV cell that has no value."""
REQUIRED = ("context", "question")
FORMATS = (
    "SQuAD JSON, JSON lines, CSV or TSV (.json, .jsonl, .csv, .tsv), a .parquet file, a folder that `save_to_disk` of "
    "datasets wrote, or an id of the hub"
)
"""What is read, for messages."""
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LITERAL_BEGINNINGS = ("[", "{", "('", '("', "array(")
"""Of a list, a dict, a tuple or an array that is written out."""
MAX_SHOWN, MAX_COLUMNS_SHOWN = 60, 20


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


def parse_columns(columns: Iterable[str]) -> dict[str, str]:
    """What fields are called, from texts of the form `FIELD=NAME`.

    Raises:
        InvalidInputError: A text of another form, or a field that is none of `FIELDS`.
    """
    names = {}
    for column in columns:
        name, _, value = column.partition("=")
        if name not in FIELDS or not value:
            raise InvalidInputError(f"got column {column!r}; expected FIELD=NAME, with a field of {', '.join(FIELDS)}")
        names[name] = value
    return names


def examples_of(
    rows: Iterable[Row], *, source: str, skipped: list[str] | None, needs_answers: bool, unique_ids: bool
) -> list[Example]:
    """Makes the examples of rows.

    Args:
        rows: From one source.
        source: Its name in errors.
        skipped: Takes what is wrong with each bad row, which is left out then. Without it the first one is an error.
        needs_answers: False leaves gold answers aside, whatever they are: the examples have none.
        unique_ids: Whether an id that was there before makes a row bad.

    Raises:
        InvalidInputError: A bad row, or no row that can be used.
    """
    examples: list[Example] = []
    places: dict[str, str] = {}
    for row in rows:
        try:
            example = _example(row, needs_answers=needs_answers)
            if unique_ids and example.id in places:
                other = places[example.id]
                fail(inside(row.place, "id"), shown(example.id), f"an id of its own ({other} has it too)")
        except InvalidInputError as error:
            message = f"{source}: {error}"
            if skipped is None:
                raise InvalidInputError(message) from error
            skipped.append(message)
            continue
        places[example.id] = row.place
        examples.append(example)
    if not examples and skipped:
        first = skipped[0].removeprefix(f"{source}: ")
        raise InvalidInputError(f"{source}: all {len(skipped)} rows are bad, the first: {first}")
    if not examples:
        raise InvalidInputError(f"{source}: there are no questions; expected at least one")
    return examples


def fail(place: str, given: str, expected: str) -> NoReturn:
    """Raises what is wrong with one place of a file."""
    raise InvalidInputError(problem_at(place, given, expected))


def problem_at(place: str, given: str, expected: str) -> str:
    """What is wrong with one place of a file, as a message."""
    return f"{place or 'the top level'}: got {given}; expected {expected}"


def inside(place: str, name: str) -> str:
    """The place of a field: `line 3: question`, `data[0].title`."""
    return f"{place}.{name}" if place.endswith("]") else f"{place}: {name}" if place else name


def _example(row: Row, *, needs_answers: bool) -> Example:
    names = _names(row)
    values = {name: row.values.get(column) for name, column in names.items()}
    for field, value in values.items():
        is_missing_word = row.is_text and field != "answers" and value in MISSING_WORDS
        if is_missing_word or (isinstance(value, float) and value != value):
            values[field] = None
    texts = {}
    for name in REQUIRED:
        _check_column(row, name, names)
        texts[name] = _text(values[name], inside(row.place, names[name]))
    return Example(
        id=_name(values["id"], inside(row.place, names["id"])) or row.place or "question",
        title=_name(values["title"], inside(row.place, names["title"])),
        context=texts["context"],
        question=texts["question"],
        answers=_answers(row, names, values, texts["context"]) if needs_answers else (),
    )


def _names(row: Row) -> dict[str, str]:
    """What each field is called in a row."""
    if row.problem:
        raise InvalidInputError(row.problem)
    if not isinstance(row.values, dict):
        fail(row.place, f"a JSON {json_kind(row.values)}", "an object with context, question and answers")
    columns = row.columns or {}
    found = {column.lower(): column for column in reversed(row.values)}
    names = {
        name: columns.get(name) or next((found[other] for other in others if other in found), name)
        for name, others in NAMES.items()
    }
    for name in columns:
        _check_column(row, name, names)
    return names


def _check_column(row: Row, name: str, names: Mapping[str, str]) -> None:
    if names[name] in row.values:
        return
    if row.columns is None:
        fail(inside(row.place, name), "nothing", "answers" if name == "answers" else "some text")
    has = ", ".join([shown(column) for column in row.values][:MAX_COLUMNS_SHOWN]) or "none"
    raise InvalidInputError(
        f"{row.place or 'the top level'}: no column {shown(names[name])} among {has}; expected it, or its name with "
        f"--columns {name}=NAME"
    )


def _answers(row: Row, names: Mapping[str, str], values: Mapping[str, Any], context: str) -> tuple[GoldAnswer, ...]:
    if _flag(values["is_impossible"], inside(row.place, names["is_impossible"])):
        return ()
    _check_column(row, "answers", names)
    place, start_place = inside(row.place, names["answers"]), inside(row.place, names["answer_start"])
    value, start = values["answers"], values["answer_start"]
    if row.is_text:
        value, start = _cell_value(value, context, place), _cell_value(start, "", start_place)
    elif isinstance(value, str):
        value = _answers_in(value, context)
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
    starts = [None] * len(value) if start is None else start if isinstance(start, list) else [start]
    if len(starts) != len(value):
        fail(start_place, f"{len(starts)} of {len(value)} answers", "one for each answer")
    answers = []
    for index, (item, item_start) in enumerate(zip(value, starts, strict=True)):
        if isinstance(item, dict):
            here = f"{place}[{index}]"
            answers.append(
                _gold_answer(
                    context, item.get("text"), item.get("answer_start"), f"{here}.text", f"{here}.answer_start"
                )
            )
        else:
            answers.append(_gold_answer(context, item, item_start, f"{place}[{index}]", f"{start_place}[{index}]"))
    return tuple(answers)


def _gold_answer(context: str, value: object, start: object, place: str, start_place: str) -> GoldAnswer:
    text, number = _text(value, place), _start(start, start_place)
    if number is None:
        whole_words = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
        number = whole_words.start() if whole_words else max(context.find(text), 0)
    return GoldAnswer(text=text, start=number)


def _cell_value(cell: str | None, context: str, place: str) -> Any:
    """The value of a CSV cell: what a list or a dict in it holds; None for a missing one.

    What stands in the passage as it is, such as the answer `[1]` or `None`, stays text.
    """
    text = (cell or "").strip()
    if text in MISSING_WORDS:
        return cell if re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context) else None
    if not text.startswith(LITERAL_BEGINNINGS) or text in context:
        return cell
    try:
        return parse_literal(text)
    except ValueError as error:
        fail(place, shown(cell), f"a text that stands in the passage, or a whole list or dict ({error})")


def _answers_in(text: str, context: str) -> Any:
    """The answers that are written out in a text of JSON or Parquet; the text where it is an answer itself."""
    if not text.startswith(LITERAL_BEGINNINGS) or text in context:
        return text
    try:
        value = parse_literal(text)
    except ValueError:
        return text
    objects = value if isinstance(value, list) else [value]
    is_objects = all(isinstance(item, dict) and "text" in item for item in objects)
    is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if value and (is_objects or is_texts) else text


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


def shown(value: object) -> str:
    """A value of a file as messages show it."""
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    if isinstance(value, dict | list | bool | None):
        return f"a JSON {json_kind(value)}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
