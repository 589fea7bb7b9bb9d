"""Where examples come from: SQuAD files, JSONL and CSV files, data sets of the hub, and the generated `sample`."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError

from qa_onnx.errors import InvalidInputError, one_line
from qa_onnx.evaluation.squad import Example, GoldAnswer, parse_squad, read_json
from training.starter.sample import generate, with_unanswerable

Part = Literal["train", "eval"]
SAMPLES = ("sample", "sample_v2")
HUB_DATASETS = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
FIELDS = ("context", "question", "answers", "answer_start", "id", "title")
"""Of a row of JSONL, CSV or the hub; `columns` maps them to other names."""
REQUIRED = ("answers", "context", "question")
SURPLUS = "(surplus fields)"
MAX_NAMED_ROWS = 5
MAX_CSV_FIELD = 2**31 - 1
"""Characters; Python's own limit of 131,072 is less than some documents have."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The examples of one source, and what was found in them.

    Attributes:
        name: As given.
        examples: Its questions, bad rows left out.
        sha256: Of the examples.
        bad_rows: What is wrong with each row that was skipped.
        repaired: Answers whose `answer_start` was wrong, and whose text stands elsewhere in the passage.
        absent: Answers that do not stand in their passage. They are trained on as they are.
    """

    name: str
    examples: tuple[Example, ...]
    sha256: str
    bad_rows: tuple[str, ...] = ()
    repaired: int = 0
    absent: int = 0

    def warnings(self) -> list[str]:
        """What a user has to know, a line each."""
        lines = []
        if self.bad_rows:
            more = len(self.bad_rows) - MAX_NAMED_ROWS
            lines += [f"skipped: {row}" for row in self.bad_rows[:MAX_NAMED_ROWS]]
            lines += [f"skipped: {more} more of {self.name}"] if more > 0 else []
        if self.repaired:
            lines.append(f"{self.name}: {self.repaired} answers stand elsewhere than answer_start says; repaired")
        if self.absent:
            lines.append(f"{self.name}: {self.absent} answers do not stand in their passage; trained on as they are")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The source in figures, ready for JSON."""
        return {
            "name": self.name,
            "questions": len(self.examples),
            "passages": len({example.context for example in self.examples}),
            "without_answer": sum(not example.answers for example in self.examples),
            "bad_rows": len(self.bad_rows),
            "answers_repaired": self.repaired,
            "answers_absent": self.absent,
            "sha256": self.sha256,
        }


def load_source(
    name: str, part: Part, *, columns: Mapping[str, str] | None = None, skip_bad_rows: bool = False
) -> Source:
    """Loads the examples of one source.

    Args:
        name: `sample` or `sample_v2` (generated); `squad`, `squad_v2` or an id such as `owner/name` (from the hub, its
            split `train` or `validation`); a `.jsonl` or `.csv` file with a row for each question; any other file is
            SQuAD JSON, v1.1 or v2.0.
        part: Which of the two splits.
        columns: What the fields of `FIELDS` are called in a JSONL or CSV file or on the hub, where not by their own
            names. `answers` may hold one text, a list of texts, or what SQuAD has there, and be empty; `answer` is
            taken where there is no `answers`.
        skip_bad_rows: Leave bad rows out, instead of ending with the first.

    Raises:
        InvalidInputError: A bad row, no row at all, a file that cannot be read, a hub that cannot be reached.
    """
    skipped: list[str] | None = [] if skip_bad_rows else None
    if name in SAMPLES:
        data = generate("train" if part == "train" else "heldout")
        examples = parse_squad(data if name == "sample" else with_unanswerable(data), source=name)
    elif Path(name).suffix in (".jsonl", ".csv"):
        examples = _examples(_rows_of_file(Path(name)), columns or {}, skipped)
    elif name in HUB_DATASETS or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not _is_file(name)):
        examples = _examples(_rows_of_hub(name, part), columns or {}, skipped)
    else:
        examples = parse_squad(read_json(name), source=name, skipped=skipped)
    if not examples:
        found = f"all {len(skipped)} rows are bad, the first: {skipped[0]}" if skipped else "there are no questions"
        raise InvalidInputError(f"{name}: {found}; expected at least one that can be used")
    checked = [_checked(example) for example in examples]
    kept = tuple(example for example, _, _ in checked)
    digest = hashlib.sha256()
    for example in kept:
        digest.update(json.dumps(asdict(example)).encode())
    return Source(
        name=name,
        examples=kept,
        sha256=digest.hexdigest(),
        bad_rows=tuple(skipped or ()),
        repaired=sum(repaired for _, repaired, _ in checked),
        absent=sum(absent for _, _, absent in checked),
    )


def weighted(source: Source, weight: float, seed: int) -> list[Example]:
    """The source's examples `weight` times over; a fraction is a random part, in the source's order."""
    times, fraction = divmod(weight, 1.0)
    part = round(fraction * len(source.examples))
    chosen = sorted(random.Random(seed).sample(range(len(source.examples)), part))
    return [*source.examples * int(times), *(source.examples[index] for index in chosen)]


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".json" or Path(name).exists()


def _rows_of_file(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL or CSV file, each with its place; a line that is not JSON is None."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                csv.field_size_limit(MAX_CSV_FIELD)
                reader = csv.DictReader(file, restkey=SURPLUS)
                for row in reader:
                    filled = {name: field for name, field in row.items() if field is not None}  # not in a short row
                    yield f"{path}: line {reader.line_num}", filled
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}: line {number}", json.loads(line)
                    except (ValueError, RecursionError):
                        yield f"{path}: line {number}", None
    except csv.Error as error:
        raise InvalidInputError(f"{path}: line {reader.line_num + 1} is not CSV ({error}); mend its quotes") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror}); expected a JSONL or CSV file") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: byte {error.start} is not UTF-8; expected a file in UTF-8") from error


def _rows_of_hub(name: str, part: Part) -> Iterator[tuple[str, Any]]:
    split = "train" if part == "train" else "validation"
    try:
        rows = load_dataset(HUB_DATASETS.get(name, name), split=split)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise InvalidInputError(
            f"{name!r} is no file, and its split {split!r} could not be loaded from the hub ({one_line(error)}). Check "
            "the name and the connection, or give a SQuAD JSON, JSONL or CSV file, or 'sample'"
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}: row {number}", row


def _examples(rows: Iterator[tuple[str, Any]], columns: Mapping[str, str], skipped: list[str] | None) -> list[Example]:
    examples = []
    for place, row in rows:
        try:
            examples.append(_example(row, place, columns))
        except InvalidInputError as error:
            if skipped is None:
                raise InvalidInputError(f"{error}. Mend it, or leave such rows out with --skip-bad-rows") from error
            skipped.append(str(error))
    return examples


def _example(row: Any, place: str, columns: Mapping[str, str]) -> Example:
    if not isinstance(row, dict):
        raise InvalidInputError(f"{place}: expected a JSON object with context, question and answers")
    if SURPLUS in row:
        raise InvalidInputError(
            f"{place}: {len(row[SURPLUS])} fields more than the header has; expected as many. Quote text with commas"
        )
    named = {field: columns.get(field, field) for field in FIELDS}
    if "answers" not in columns and "answers" not in row and "answer" in row:
        named["answers"] = "answer"
    for column in [*(named[field] for field in REQUIRED), *columns.values()]:
        if column not in row:
            raise InvalidInputError(f"{place}: no column {column!r} among {sorted(row)}; name it with --columns")
    values = {field: row.get(column) for field, column in named.items()}
    for field in ("context", "question"):
        if not isinstance(values[field], str) or not values[field].strip():
            raise InvalidInputError(f"{place}: {named[field]} is {values[field]!r}; expected some text")
    texts, starts = _answers(values["answers"], values["answer_start"], place)
    context, name = values["context"], values["id"]
    name = place if name in (None, "") else str(name)
    strings = {"context": [context], "question": [values["question"]], "id": [name], "answers": texts}
    for field, found in strings.items():
        if any("\ud800" <= character <= "\udfff" for text in found for character in text):
            raise InvalidInputError(f"{place}: {named[field]} has a lone surrogate; expected text that is UTF-8")
    return Example(
        id=name,
        title=str(values["title"] or ""),
        context=context,
        question=values["question"],
        answers=tuple(
            GoldAnswer(text=text, start=max(context.find(text), 0) if start is None else start)
            for text, start in zip(texts, starts, strict=True)
        ),
    )


def _answers(value: Any, start: Any, place: str) -> tuple[list[str], list[int | None]]:
    """Texts and starts of whatever stands for answers: a text, a list of texts, SQuAD's lists, or objects."""
    if isinstance(value, dict) and "text" in value:
        texts, starts = value["text"], value.get("answer_start")
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        texts, starts = [item.get("text") for item in value], [item.get("answer_start") for item in value]
    else:
        texts, starts = value, start
    if texts is None or (isinstance(texts, str) and not texts.strip()):
        return [], []
    if isinstance(texts, str):
        texts, starts = [texts], [starts]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InvalidInputError(f"{place}: answers are {value!r}; expected a text, or texts")
    if not isinstance(starts, list):
        starts = [None] * len(texts)
    numbers: list[int | None] = []
    for given in starts:
        try:
            numbers.append(None if given is None or given == "" else int(given))
        except (TypeError, ValueError, OverflowError):
            raise InvalidInputError(f"{place}: answer_start is {given!r}; expected a whole number") from None
    if len(numbers) != len(texts):
        raise InvalidInputError(f"{place}: {len(texts)} answers and {len(numbers)} of answer_start; expected as many")
    return texts, numbers


def _checked(example: Example) -> tuple[Example, int, int]:
    """The example with its answers where they stand, how many were elsewhere, and how many stand nowhere."""
    answers: list[GoldAnswer] = []
    repaired = absent = 0
    for answer in example.answers:
        if answer.start >= 0 and example.context.startswith(answer.text, answer.start):
            answers.append(answer)
            continue
        places = [match.start() for match in re.finditer(re.escape(answer.text), example.context)]
        if places:
            repaired += 1
            answers.append(replace(answer, start=min(places, key=lambda place: abs(place - answer.start))))
        else:
            absent += 1
            answers.append(answer)
    return replace(example, answers=tuple(answers)), repaired, absent
